"""What was probably meant by a name that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of *known* that looks most like *name*; None if none looks alike."""
    import difflib  # only what went wrong pays for it

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
