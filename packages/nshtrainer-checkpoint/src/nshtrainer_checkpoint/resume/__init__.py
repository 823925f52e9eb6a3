"""Exact resume: random states, the place in the epoch's data, and what Lightning's own state lacks."""

from __future__ import annotations

from .state import ResumeState

__all__ = ["ResumeState"]
