"""The values of one metric over the steps, in bounded memory and with nothing extreme lost."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

__all__ = ["Series", "thin"]

Point = tuple[float, float]


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
        self._limit = 10 * buckets
        self.xs, self.ys = array("d"), array("d")
        self.count = 0
        """How many points were added."""

    def add(self, x: float, y: float) -> None:
        """Add a point; one at an earlier step replaces all that came after it: the run was resumed."""
        if self.xs and x < self.xs[-1]:
            self.cut(x)
        self.xs.append(x)
        self.ys.append(y)
        self.count += 1
        if len(self.xs) > self._limit:
            self.xs, self.ys = thin(self.xs, self.ys, self._buckets)

    def cut(self, x: float) -> None:
        """Drop the points from *x* on."""
        at = bisect_left(self.xs, x)
        self.count -= len(self.xs) - at
        del self.xs[at:], self.ys[at:]

    def extend(self, other: Series) -> None:
        """Let the points of *other* follow, and replace those from its first step on."""
        if not other.xs:
            return
        self.cut(other.xs[0])
        self.count += other.count
        self.xs.extend(other.xs)
        self.ys.extend(other.ys)

    @property
    def finite(self) -> list[Point]:
        """The points that are numbers."""
        return [p for p in zip(self.xs, self.ys, strict=True) if math.isfinite(p[1])]

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
    width = (xs[-1] - xs[0]) / buckets or 1.0
    out_x, out_y = array("d"), array("d")
    for start, end in _stretches(xs, width):
        for i in _worth_keeping(ys, start, end):
            out_x.append(xs[i])
            out_y.append(ys[i])
    return out_x, out_y


def _stretches(xs: Sequence[float], width: float) -> Iterator[tuple[int, int]]:
    start, bucket = 0, 0
    for i, x in enumerate(xs):
        mine = int((x - xs[0]) / width)
        if mine != bucket:
            if i > start:
                yield start, i
            start, bucket = i, mine
    yield start, len(xs)


def _worth_keeping(ys: Sequence[float], start: int, end: int) -> list[int]:
    kept = {start, end - 1}
    low = high = bad = -1
    for i in range(start, end):
        y = ys[i]
        if not math.isfinite(y):
            if bad < 0:
                bad = i
        elif low < 0:
            low = high = i
        elif y < ys[low]:
            low = i
        elif y > ys[high]:
            high = i
    kept.update(i for i in (low, high, bad) if i >= 0)
    return sorted(kept)
