"""Sizes and ages as text for people: reports, tables of the command line, messages."""

from __future__ import annotations

from typing import Final

__all__ = ["age_text", "size_text"]

_AGES: Final = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def size_text(size: float) -> str:
    """Return *size*, in bytes, with a decimal unit: `512 bytes`, `12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def age_text(seconds: float | None) -> str:
    """Return *seconds* in the largest unit that fits: `3 d`, `12 min`; nothing where it is None."""
    if seconds is None:
        return ""
    unit, length = next(((u, s) for u, s in _AGES if seconds >= s), _AGES[-1])
    return f"{seconds / length:.0f} {unit}"
