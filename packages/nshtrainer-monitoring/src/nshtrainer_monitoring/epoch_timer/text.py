"""Durations and shares for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .phases import Phase

__all__ = ["describe_duration", "describe_shares"]


def describe_duration(seconds: float) -> str:
    """Return *seconds* as `12.30 s`, `4:05` (minutes) or `1:04:05` (hours)."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_shares(seconds: Mapping[Phase, float]) -> str:
    """Return what part each of *seconds* is of them all: `data 12 %, forward 40 %`."""
    whole = sum(seconds.values())
    if not whole:
        return ""
    return ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in seconds.items())
