"""Axes: which range and scale show values well, and where round numbers are on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["DECADES", "Axis", "axis_of", "number", "steps_axis"]

DECADES: Final = 3
"""Positive values that span so many are shown on a log scale."""
_LARGEST: Final = 1e300  # beyond it differences overflow


@dataclass(frozen=True)
class Axis:
    """One direction of a plot."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def at(self, value: float) -> float:
        """Where *value* is: 0 at `low`, 1 at `high`."""
        value = min(max(value, -_LARGEST), _LARGEST)
        if self.is_log:
            a, b = math.log10(self.low), math.log10(self.high)
            return (math.log10(value) - a) / (b - a)
        return (value - self.low) / (self.high - self.low)


def axis_of(values: Iterable[float], count: int = 5, decades: float = DECADES) -> Axis:
    """Return an axis for finite *values*, with about *count* ticks.

    Args:
        values: What it has to hold.
        count: Of ticks, about.
        decades: Positive values that span so many are shown on a log scale.
    """
    found = [v for v in values if math.isfinite(v)]
    low, high = (
        min(max(v, -_LARGEST), _LARGEST) for v in (min(found, default=0.0), max(found, default=1.0))
    )
    if low > 0 and high / low >= 10**decades:
        return _log_axis(low, high, count)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-290):  # equal, as far as labels tell
        margin = abs(low) * 0.1 if abs(low) > 1e-290 else 1.0
    else:
        margin = (high - low) * 0.04
    bottom = 0.0 if low >= 0 > low - margin else low - margin
    return _linear_axis(bottom, high + margin, count)


def steps_axis(low: float, high: float, count: int = 6) -> Axis:
    """Return the axis for steps from *low* to *high*; its ticks are whole numbers."""
    if high - low < 1e-9 * abs(high) or low == high:
        margin = max(1.0, 1e-6 * abs(high))
        low, high = low - margin, high + margin
    return _linear_axis(low, high, count, least=1.0, compact=True)


def _linear_axis(
    low: float, high: float, count: int, *, least: float = 0.0, compact: bool = False
) -> Axis:
    step = max(_nice((high - low) / count), least)
    first = math.ceil(low / step)
    number_of_ticks = math.floor(high / step) - first + 1
    ticks = tuple((first + i) * step for i in range(max(number_of_ticks, 0)))
    labels = map(_compact, ticks) if compact else _plain(ticks, step)
    return Axis(low, high, False, ticks, tuple(labels))


def _log_axis(low: float, high: float, count: int) -> Axis:
    bottom, top = low / 10**0.05 or low, high * 10**0.05  # the least number there is has none below
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / count))
    # Over so few decades, 2 and 5 are needed between the powers of ten.
    digits = (1, 2, 5) if math.log10(top / bottom) < 3 else (1,)
    labels = {
        float(label): label
        for exponent in range(first, last + 1)
        if exponent % every == 0
        for digit in digits
        if bottom <= float(label := _log_label(digit, exponent)) <= top
    }
    return Axis(bottom, top, True, tuple(labels), tuple(labels.values()))


def _log_label(digit: int, exponent: int) -> str:
    return f"{digit * 10.0**exponent:g}" if -3 <= exponent <= 4 else f"{digit}e{exponent}"


def _nice(step: float) -> float:
    """The least of 1, 2, 5, 10, ... times a power of ten that is not below *step*."""
    scale = 10.0 ** math.floor(math.log10(step))
    return next(m * scale for m in (1, 2, 5, 10) if m * scale >= step * (1 - 1e-9))


def _plain(ticks: Sequence[float], step: float) -> list[str]:
    """*ticks* in one form, with as many digits as their distance asks for."""
    size = max([abs(t) for t in ticks] + [step])
    if 1e-2 <= size < 1e5:
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{t:.{digits}f}" for t in ticks]
    return [_scientific(t, step) for t in ticks]


def _scientific(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    digits = round(math.log10(abs(value))) - math.floor(math.log10(step))
    mantissa, _, exponent = f"{value:.{min(max(digits, 0), 13)}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def _compact(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"


def number(value: float | None, digits: int = 4) -> str:
    """Return *value* for a table; "" if there is none."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"
