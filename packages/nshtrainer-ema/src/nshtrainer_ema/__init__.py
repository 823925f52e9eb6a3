"""Training dynamics for nshtrainer."""

from __future__ import annotations
