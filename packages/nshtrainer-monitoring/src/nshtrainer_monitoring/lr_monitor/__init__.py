"""Learning rates."""

from __future__ import annotations
