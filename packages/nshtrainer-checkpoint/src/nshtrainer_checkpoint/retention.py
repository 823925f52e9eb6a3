"""Which checkpoints stay: pure functions over records, without files, clocks or trainers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

__all__ = ["Ranked", "Retention", "best_first", "newest_first", "retain"]


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


R = TypeVar("R", bound=Ranked)


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


def retain(
    ranked: Sequence[R], new: R, topk: int | None, may_remove: Callable[[R], bool]
) -> Retention[R]:
    """Decide with *ranked*, which holds *new*, the first one being the most worth keeping.

    Args:
        ranked: All that compete.
        new: The one that would be written; it is never removed.
        topk: How many stay; None is all.
        may_remove: Says of one behind the first *topk* whether it may be deleted.

    Nothing is removed if the new one is not written: what is there stays as it is.
    """
    kept = tuple(ranked if topk is None else ranked[:topk])
    if not any(r is new for r in kept):
        return Retention(False, tuple(r for r in ranked if r is not new), ())
    rest = [r for r in ranked if not any(r is k for k in kept)]
    removed = tuple(r for r in rest if may_remove(r))
    return Retention(True, kept, removed)
