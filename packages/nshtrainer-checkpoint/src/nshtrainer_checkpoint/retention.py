"""Which checkpoints stay: pure functions over records, without files, clocks or trainers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

__all__ = ["Keep", "Ranked", "Retention", "Sized", "best_first", "decide", "newest_first"]


class Ranked(Protocol):
    """What a checkpoint is ranked by."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Attempt, step and save number: a later checkpoint has the greater one."""
        ...

    @property
    def value(self) -> float | None:
        """The metric, if it was logged."""
        ...


class Sized(Ranked, Protocol):
    """What is decided on where sizes count."""

    @property
    def size(self) -> int:
        """Bytes; 0 for one that is not written yet."""
        ...


R = TypeVar("R", bound=Ranked)
S = TypeVar("S", bound=Sized)


def newest_first(records: Iterable[R]) -> list[R]:
    """Sort by attempt, step and save number; a clock has no say."""
    return sorted(records, key=lambda r: r.order, reverse=True)


def best_first(records: Iterable[R], mode: Literal["min", "max"]) -> list[R]:
    """Sort by value; what is no finite number comes last, and of equal ones the earlier first."""

    def key(record: R) -> tuple[bool, float, tuple[int, int, int]]:
        value = record.value
        if value is None or not math.isfinite(value):
            return (True, 0.0, record.order)
        return (False, value if mode == "min" else -value, record.order)

    return sorted(records, key=key)


@dataclass(frozen=True)
class Retention(Generic[R]):
    """What becomes of a new checkpoint and of those before it."""

    saves: bool
    """Whether the new one is to be written."""
    kept: tuple[R, ...]
    """What is there afterwards and counts, first one first."""
    removed: tuple[R, ...]
    """What may be deleted once the new one is committed."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are to stay."""

    order: Literal["best", "newest"]
    """What is most worth keeping: the best value or the latest save."""
    mode: Literal["min", "max"] = "min"
    """Which values are better, for the order `best`."""
    topk: int | None = None
    """How many stay besides the milestones; None is all."""
    every_n_steps: int | None = None
    """Steps that are a multiple are milestones: never removed, and not among *topk*."""
    max_bytes: int | None = None
    """What all that stay may occupy together; None is any size."""

    def rank(self, records: Iterable[R]) -> list[R]:
        """Sort, the most worth keeping first."""
        return newest_first(records) if self.order == "newest" else best_first(records, self.mode)

    def is_milestone(self, record: Ranked) -> bool:
        """Whether its step is one that stays for good."""
        step = record.order[1]
        return self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0


def decide(
    records: Iterable[S],
    keep: Keep,
    *,
    new: S | None = None,
    may_remove: Callable[[S], bool] = lambda _: True,
) -> Retention[S]:
    """Decide what stays.

    Args:
        records: All that compete, in any order; *new* may be among them.
        keep: What is to stay.
        new: The one that would be written, None if there is none. With size 0 it is taken to be as
            large as the latest other.
        may_remove: Says whether one may be deleted. What may not stays, and its size counts.

    Of the saves of one step the latest counts, in the order `newest`. The first one, milestones and
    *new* are never removed. Behind *topk*, or as the least worth
    keeping of what is too large, *new* is not written, and then nothing is removed at all.
    """
    others = [r for r in records if r is not new]
    ranked = keep.rank(others if new is None else [*others, new])
    # A step saved before its validation and again after it: the later save has all of the earlier.
    saved_later = _saved_later(ranked) if keep.order == "newest" else set[int]()
    milestones = {id(r) for r in ranked if keep.is_milestone(r) and id(r) not in saved_later}
    counted = [r for r in ranked if id(r) not in milestones | saved_later]
    stays = milestones | {id(r) for r in counted[: keep.topk]}
    not_written = Retention(False, tuple(r for r in ranked if r is not new), ())
    if new is not None and id(new) not in stays:
        return not_written
    removed = {id(r) for r in ranked if id(r) not in stays and may_remove(r)}
    if keep.max_bytes is not None:
        sizes = {id(r): r.size for r in ranked}
        if new is not None and new.size == 0 and others:
            sizes[id(new)] = newest_first(others)[0].size
        total = sum(size for key, size in sizes.items() if key not in removed)
        for record in reversed(ranked[1:]):
            if total <= keep.max_bytes:
                break
            if id(record) in milestones or id(record) in removed:
                continue
            if record is new:
                return not_written
            if may_remove(record):
                removed.add(id(record))
                total -= sizes[id(record)]
    return Retention(
        new is not None,
        tuple(r for r in ranked if id(r) in stays and id(r) not in removed),
        tuple(r for r in ranked if id(r) in removed),
    )


def _saved_later(newest: Iterable[Ranked]) -> set[int]:
    """The ids of those whose step was saved once more; *newest* is sorted so."""
    seen: set[tuple[int, int]] = set()
    found: set[int] = set()
    for record in newest:
        attempt, step, _ = record.order
        if (attempt, step) in seen:
            found.add(id(record))
        seen.add((attempt, step))
    return found
