"""The values of one metric over the steps, in bounded memory and with nothing extreme lost."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

__all__ = ["POINTS_KEPT", "Series", "thin"]

Point = tuple[float, float]

POINTS_KEPT: Final = 20
"""For each bucket, at most, until they are thinned: more cost memory, fewer cost time."""


class Series:
    """Points in the order of their steps, thinned while they are added.

    Args:
        name: Of the metric.
        buckets: In how many stretches of equal length the steps are divided when there are too many
            points; of each stretch `thin` keeps at most five.
    """

    def __init__(self, name: str, buckets: int = 1000) -> None:
        self.name = name
        self._buckets = buckets
        self._limit = POINTS_KEPT * buckets
        self.xs, self.ys = array("d"), array("d")
        self.count = 0
        """How many points were added."""
        self._finite: list[Point] | None = None

    def add(self, x: float, y: float) -> None:
        """Add a point; one at an earlier step replaces all that came after it: the run was resumed."""
        self.add_all((x,), (y,))

    def add_all(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Add points whose steps ascend, as `add` does one."""
        if self.xs and xs and xs[0] < self.xs[-1]:
            self.cut(xs[0])
        self._finite = None
        self.xs.extend(xs)
        self.ys.extend(ys)
        self.count += len(xs)
        if len(self.xs) > self._limit:
            self.xs, self.ys = thin(self.xs, self.ys, self._buckets)

    def cut(self, x: float) -> None:
        """Drop the points from *x* on."""
        self._finite = None
        at = bisect_left(self.xs, x)
        self.count -= len(self.xs) - at
        del self.xs[at:], self.ys[at:]

    def extend(self, other: Series) -> None:
        """Let the points of *other* follow, and replace those from its first step on."""
        if not other.xs:
            return
        self.cut(other.xs[0])
        self.add_all(other.xs, other.ys)
        self.count += other.count - len(other.xs)

    @property
    def finite(self) -> list[Point]:
        """The points that are numbers."""
        if self._finite is None:
            both = zip(self.xs, self.ys, strict=True)
            self._finite = [point for point in both if math.isfinite(point[1])]
        return self._finite

    @property
    def range(self) -> list[float]:
        """The least and the greatest finite value, if there are any."""
        return [point[1] for point in (self.lowest, self.highest) if point is not None]

    @property
    def last(self) -> Point | None:
        """The last point, whatever its value."""
        return (self.xs[-1], self.ys[-1]) if self.xs else None

    @property
    def lowest(self) -> Point | None:
        """The first one of the least finite value."""
        return min(self.finite, key=lambda p: p[1], default=None)

    @property
    def highest(self) -> Point | None:
        """The first one of the greatest finite value."""
        return max(self.finite, key=lambda p: p[1], default=None)

    @property
    def nonfinite(self) -> list[Point]:
        """Where NaN and infinities are; of many close to each other the first."""
        return [p for p in zip(self.xs, self.ys, strict=True) if not math.isfinite(p[1])]


def thin(
    xs: Sequence[float], ys: Sequence[float], buckets: int
) -> tuple[array[float], array[float]]:
    """Return at most five points of each of *buckets* stretches: a line through them looks the same.

    Kept are the first, the last, the lowest and the highest (U. Jugel et al. 2014, "M4", VLDB 7(10)),
    and the first that is no number, so that a gap stays one.

    Args:
        xs: Ascending.
        ys: As many.
        buckets: From 1.
    """
    if len(xs) <= 5 * buckets:
        return array("d", xs), array("d", ys)
    out_x, out_y = array("d"), array("d")
    for start, end in _stretches(xs, buckets):
        for i in _worth_keeping(ys, start, end):
            out_x.append(xs[i])
            out_y.append(ys[i])
    return out_x, out_y


def _stretches(xs: Sequence[float], buckets: int) -> Iterator[tuple[int, int]]:
    width = (xs[-1] - xs[0]) / buckets
    start = 0
    for bucket in range(1, buckets + 1):
        last = bucket == buckets
        end = len(xs) if last else bisect_left(xs, xs[0] + bucket * width, start)
        if end > start:
            yield start, end
            start = end


def _worth_keeping(ys: Sequence[float], start: int, end: int) -> list[int]:
    part = ys[start:end]
    if math.isfinite(sum(part)):  # so is each of them, and what follows runs without a loop of ours
        lowest, highest = part.index(min(part)), part.index(max(part))
        return sorted({start, end - 1, start + lowest, start + highest})
    finite = [i for i in range(start, end) if math.isfinite(ys[i])]
    kept = {start, end - 1}
    if finite:
        kept |= {min(finite, key=ys.__getitem__), max(finite, key=ys.__getitem__)}
    kept.update([i for i in range(start, end) if not math.isfinite(ys[i])][:1])
    return sorted(kept)
