"""Which of the checkpoints that were found are what was committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nshtrainer_checkpoint.verify import damage

from .found import Found

__all__ = ["Checked", "check_all"]

Verdict = Literal["ok", "damaged", "unfinished", "unknown"]
_DAMAGED = frozenset({"bad metadata", "file missing", "size differs"})


@dataclass(frozen=True)
class Checked:
    """One that was looked at."""

    found: Found
    verdict: Verdict
    why: str = ""
    before: Found | None = None
    """Of a damaged one: the newest good one of its run that was saved before it, if there is one."""


def check_all(found: Sequence[Found], *, fast: bool = False) -> list[Checked]:
    """Look at each of *found*.

    Args:
        found: Newest first.
        fast: Compare sizes only.
    """
    seen = [(one, *_look(one, fast=fast)) for one in found]
    good = [one for one, verdict, _ in seen if verdict == "ok"]
    return [
        Checked(one, verdict, why, _before(one, good) if verdict == "damaged" else None)
        for one, verdict, why in seen
    ]


def _look(one: Found, *, fast: bool) -> tuple[Verdict, str]:
    if one.state in _DAMAGED:
        return "damaged", one.why
    if one.state == "unfinished":
        return "unfinished", one.why
    if one.record is None:
        return "unknown", one.why
    why = damage(one.record, fast=fast)
    return ("ok", "") if why is None else ("damaged", why)


def _before(one: Found, good: Sequence[Found]) -> Found | None:
    """The newest of *good* in the run of *one* that was saved earlier, or else the newest there."""
    mine = [
        g
        for g in good
        if g.group == one.group and g.record is not None and not g.record.weights_only
    ]
    mine.sort(key=lambda g: g.order, reverse=True)
    earlier = [g for g in mine if one.record is not None and g.order < one.order]
    return next(iter(earlier or mine), None)
