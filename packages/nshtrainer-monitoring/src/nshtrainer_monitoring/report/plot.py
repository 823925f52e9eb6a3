"""One plot as SVG, drawn by hand: small, sharp at every size, readable without a script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from .axes import DECADES, Axis, axis_of, number, steps_axis
from .markup import esc
from .series import Series, thin

__all__ = ["LARGE", "SMALL", "Curve", "Mark", "Size", "figure"]

_DOTS: Final = 40
"""A curve of no more points shows each of them."""
_MARKS: Final = 200
_DENSE: Final = 8
"""A curve that goes up and down the whole plot more often is drawn with a finer line."""


@dataclass(frozen=True)
class Size:
    """How large a plot is, in CSS pixels before it is fitted to the page."""

    width: int
    height: int
    left: int
    bottom: int
    css: str
    ticks: int

    @property
    def inner(self) -> tuple[int, int]:
        """Width and height of the area of the curves."""
        return self.width - self.left - 12, self.height - self.bottom - 10


LARGE: Final = Size(640, 270, 58, 26, "plot", 5)
SMALL: Final = Size(360, 150, 52, 22, "plot small", 3)


@dataclass(frozen=True)
class Mark:
    """A step at which something happened."""

    step: float
    label: str
    at_bottom: bool
    """Where the curve leaves room for the label."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    series: Series
    color: int
    """0 to 7."""
    style: str = ""
    """`thin`, `thick` or `dashed`."""


def figure(
    title: str,
    curves: Sequence[Curve],
    *,
    size: Size = LARGE,
    mark: Mark | None = None,
    decades: float = DECADES,
    steps: tuple[float, float] | None = None,
) -> str:
    """A plot with title and legend.

    Args:
        title: What is shown.
        curves: At least one.
        size: Of the plot.
        mark: What is shown beside the curves.
        decades: From how many on the scale is logarithmic.
        steps: The first and the last to be shown; None takes those of the curves.
    """
    xs = steps or [x for c in curves for x in (c.series.xs[0], c.series.xs[-1])]
    across = steps_axis(min(xs), max(xs), size.ticks + 1)
    up = axis_of((y for c in curves for y in c.series.range), size.ticks, decades)
    width, height = size.inner
    body = [
        _grid(across, up, size),
        *([_mark(across, mark, size)] if mark is not None else []),
        *(_curve(c, across, up, size) for c in curves),
        _bad(curves, across, size),
        f'<g class="cursor" hidden><path d="M0 10v{height}"/></g>',
    ]
    scale = f"{across.low!r} {across.high!r} {up.low!r} {up.high!r} {int(up.is_log)}"
    box = f"{size.left} 10 {width} {height}"
    return (
        f'<figure class="{size.css}"><figcaption><h3>{esc(title)}</h3>'
        f"{'<span class=tag>log</span>' if up.is_log else ''}{_legend(title, curves)}</figcaption>\n"
        f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{esc(_said(title, curves))}" '
        f'data-scale="{scale}" data-box="{box}">\n' + "\n".join(b for b in body if b) + "\n</svg>"
        "</figure>"
    )


def _grid(across: Axis, up: Axis, size: Size) -> str:
    width, height = size.inner
    parts: list[str] = []
    for value, label in zip(up.ticks, up.labels, strict=True):
        y = 10 + height * (1 - up.at(value))
        parts.append(
            f'<path class="grid" d="M{size.left} {y:.1f}h{width}"/>'
            f'<text x="{size.left - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    for value, label in zip(across.ticks, across.labels, strict=True):
        x = size.left + width * across.at(value)
        parts.append(
            f'<path class="tick" d="M{x:.1f} {10 + height}v4"/>'
            f'<text x="{x:.1f}" y="{height + 26}" text-anchor="middle">{label}</text>'
        )
    parts.append(f'<path class="base" d="M{size.left} {10 + height}h{width}"/>')
    return f'<g class="axes">{"".join(parts)}</g>'


def _curve(curve: Curve, across: Axis, up: Axis, size: Size) -> str:
    width, height = size.inner
    # Two points for a pixel is all that can be seen.
    xs, ys = thin(curve.series.xs, curve.series.ys, width // 2)
    path: list[str] = []
    alone: list[str] = []
    pen_up, points = True, 0
    height_before, travel = 0.0, 0.0
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if not math.isfinite(y):
            pen_up = True
            continue
        place = up.at(y)
        travel += abs(place - height_before)
        height_before = place
        at = f"{_short(size.left + width * across.at(x))} {_short(10 + height * (1 - place))}"
        is_alone = pen_up and (i + 1 == len(ys) or not math.isfinite(ys[i + 1]))
        path.append(f"{'M' if pen_up else 'L'}{at}")
        if is_alone or len(xs) <= _DOTS:
            alone.append(f"M{at}h0")  # of no length, with round ends: a dot
        pen_up, points = False, points + 1
    if not points:
        return ""
    dense = " dense" if travel > _DENSE else ""
    css = f"c{curve.color} {curve.style}{dense}".replace("  ", " ").strip()
    dots = f'<path class="dots c{curve.color}" d="{"".join(alone)}"/>' if alone else ""
    return f'<path class="curve {css}" data-label="{esc(curve.label)}" d="{"".join(path)}"/>{dots}'


def _bad(curves: Iterable[Curve], across: Axis, size: Size) -> str:
    """Where values are no numbers: small marks at the bottom, in the colour of their curve."""
    width, height = size.inner
    parts: list[str] = []
    for curve in curves:
        bad = curve.series.nonfinite
        places = sorted({round(size.left + width * across.at(x)) for x, _ in bad})[:_MARKS]
        if places:
            shape = "".join(f"M{x} {10 + height - 8}l4 8h-8z" for x in places)
            what = f"{curve.label}: NaN or infinite, first at step {number(bad[0][0])}"
            parts.append(f'<path class="bad" d="{shape}"><title>{esc(what)}</title></path>')
    return "".join(parts)


def _mark(across: Axis, mark: Mark, size: Size) -> str:
    if not across.low <= mark.step <= across.high:
        return ""
    width, height = size.inner
    place = across.at(mark.step)
    x = size.left + width * place
    anchor, shift = ("end", -5) if place > 0.5 else ("start", 5)
    y = height + 4 if mark.at_bottom else 20
    return (
        f'<g class="mark"><path d="M{x:.1f} 10v{height}"/>'
        f'<text x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">{esc(mark.label)}</text></g>'
    )


def _legend(title: str, curves: Sequence[Curve]) -> str:
    is_said = [c.label for c in curves] == [title]
    entries: list[str] = []
    for curve in curves:
        last = curve.series.last
        value = number(None if last is None else last[1])
        style = f" {curve.style}" if curve.style else ""
        entries.append(
            f'<span class="key"><i class="k{curve.color}{style}"></i>{"" if is_said else esc(curve.label)} <b>{esc(value)}</b></span>'
        )
    return f'<span class="legend">{"".join(entries)}</span>'


def _said(title: str, curves: Iterable[Curve]) -> str:
    """The plot in words, for who cannot see it."""
    parts: list[str] = []
    for curve in curves:
        lowest, highest, last = curve.series.lowest, curve.series.highest, curve.series.last
        if lowest is None or highest is None or last is None:
            parts.append(f"{curve.label} has no finite value")
        else:
            parts.append(
                f"{curve.label} between {number(lowest[1])} and {number(highest[1])}, "
                f"at the end {number(last[1])}"
            )
    return f"{title} over the steps. {'; '.join(parts)}."


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
