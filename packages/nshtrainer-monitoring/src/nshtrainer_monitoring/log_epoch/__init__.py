"""The epoch as a fraction."""

from __future__ import annotations
