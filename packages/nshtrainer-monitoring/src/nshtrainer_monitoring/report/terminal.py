"""The main curves as text, for a terminal of any width and encoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import click

from .arranging import Panel, arrange
from .axes import axis_of, number, steps_axis
from .curves import steps_of
from .run import RunData
from .sections import best_of, duration, status_text
from .series import Series

__all__ = ["Style", "draw"]

Place = Callable[[float], float]
"""Where a value is on an axis."""

_ROWS: Final = 10
_LEFT: Final = 9
_COLORS: Final = ("blue", "yellow", "green", "magenta", "red", "cyan", "white", "bright_black")
_ASCII: Final = ".o+x*#%@"
# The dots of a braille character: columns by rows.
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True)
class Style:
    """What the terminal can show."""

    width: int = 80
    encoding: str = "utf-8"
    color: bool = False

    @property
    def has_braille(self) -> bool:
        """Whether dots and box lines can be written."""
        try:
            "⣿│└─".encode(self.encoding)
        except (UnicodeError, LookupError):
            return False
        return True

    def text(self, value: object) -> str:
        """*value* without what moves the cursor, and without what the encoding lacks."""
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
        try:
            return shown.encode(self.encoding, "replace").decode(self.encoding)
        except LookupError:
            return shown.encode("ascii", "replace").decode("ascii")

    def paint(self, text: str, color: int) -> str:
        """*text* in the colour of a curve."""
        return click.style(text, fg=_COLORS[color % len(_COLORS)]) if self.color else text


def draw(runs: Sequence[RunData], style: Style) -> str:
    """Return the head and the main curves of *runs*, no line wider than the terminal."""
    lines: list[str] = []
    for index, run in enumerate(runs):
        lines += _head(run, style, index if len(runs) > 1 else None)
    names = {name for run in runs for name in run.metrics.series}
    primary = next((run.primary[0] for run in runs if run.primary), None)
    for panel in arrange(names, primary).main:
        curves = [
            (_label(run, line.label, len(runs)), run.metrics.series[line.metric])
            for run in runs
            for line in panel.lines
            if line.metric in run.metrics.series
        ]
        lines += ["", *_plot(panel, curves, style, steps_of(runs))]
    for run in runs:
        lines += ["", *(_cut(style.text(f"note: {n}"), style.width) for n in run.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _label(run: RunData, label: str, count: int) -> str:
    return f"{run.label} {label}" if count > 1 else label


def _head(run: RunData, style: Style, color: int | None) -> list[str]:
    best, last = best_of(run), run.metrics.last_step
    facts = [
        status_text(run),
        "" if last is None else f"{number(last + 1)} steps",
        f"best {run.primary[0]} {number(best[1])} at step {number(best[0])}"
        if best and run.primary
        else "",
        f"trained for {duration(run.seconds)}" if run.seconds else "",
    ]
    title = run.title if run.title == run.id else f"{run.title} ({run.id})"
    name = _cut(style.text(title), style.width)
    return [
        name if color is None else style.paint(name, color),
        _cut(style.text("  " + ", ".join(f for f in facts if f)), style.width),
    ]


def _plot(
    panel: Panel,
    curves: Sequence[tuple[str, Series]],
    style: Style,
    steps: tuple[float, float],
) -> list[str]:
    """Title with legend, the plot, and the steps below it."""
    width = max(20, style.width - _LEFT - 2)
    up = axis_of((y for _, s in curves for y in s.range), 4)
    across = steps_axis(*steps, max(2, width // 14))
    # Without colours the dots of several curves could not be told apart.
    is_fine = style.has_braille and (style.color or len(curves) == 1)
    fine = (2, 4) if is_fine else (1, 1)
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for color, (_, series) in enumerate(curves):
        columns, rows = width * fine[0], _ROWS * fine[1]
        for x, y in _dots(series, columns, rows, across.at, up.at):
            cell = (y // fine[1], x // fine[0])
            bits = _DOTS[x % 2][y % 4] if is_fine else 0
            old_bits, _ = cells.get(cell, (0, color))
            cells[cell] = (old_bits | bits, color)
    wall, corner, floor = "│└─" if style.has_braille else "|+-"
    labels = {
        min(int((1 - up.at(t)) * _ROWS), _ROWS - 1): label
        for t, label in zip(up.ticks, up.labels, strict=True)
    }
    body = [
        f"{labels.get(row, '')[: _LEFT - 1]:>{_LEFT}}{wall}"
        + "".join(_cell(cells.get((row, column)), style) for column in range(width)).rstrip()
        for row in range(_ROWS)
    ]
    ticks = [" "] * (width + 8)
    for tick, label in zip(across.ticks, across.labels, strict=True):
        start = max(0, int(across.at(tick) * (width - 1)) - len(label) // 2)
        if start + len(label) <= width and not "".join(ticks[max(0, start - 1) : start]).strip():
            ticks[start : start + len(label)] = label
    return [
        *_legend(panel.title + (" (log)" if up.is_log else ""), curves, style, is_fine=is_fine),
        *body,
        f"{'':>{_LEFT}}{corner}{floor * width}",
        f"{'step':>{_LEFT}} {''.join(ticks).rstrip()}",
    ]


def _cell(cell: tuple[int, int] | None, style: Style) -> str:
    if cell is None:
        return " "
    bits, color = cell
    return style.paint(chr(0x2800 + bits) if bits else _ASCII[color % len(_ASCII)], color)


def _dots(
    series: Series, columns: int, rows: int, across: Place, up: Place
) -> list[tuple[int, int]]:
    """The dots of a curve: its points, and the straight lines between those that follow each other."""
    found: list[tuple[int, int]] = []
    before: tuple[int, int] | None = None
    for x, y in zip(series.xs, series.ys, strict=True):
        if not math.isfinite(y):
            before = None
            continue
        here = (
            min(max(round(across(x) * (columns - 1)), 0), columns - 1),
            min(max(round((1 - up(y)) * (rows - 1)), 0), rows - 1),
        )
        if before is not None:
            found += _between(before, here)
        if here != before:
            found.append(here)
        before = here
    return found


def _between(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    count = max(abs(b[0] - a[0]), abs(b[1] - a[1]))
    return [
        (
            a[0] + round((b[0] - a[0]) * i / count),
            a[1] + round((b[1] - a[1]) * i / count),
        )
        for i in range(1, count)
    ]


def _legend(
    title: str, curves: Sequence[tuple[str, Series]], style: Style, *, is_fine: bool
) -> list[str]:
    """The title, and one line for each curve: its sign, its last, least and greatest value."""
    lines = [_cut(style.text(title), style.width)]
    for color, (label, series) in enumerate(curves):
        sign = "⠿" if is_fine else _ASCII[color % len(_ASCII)]
        last, low, high = series.last, series.lowest, series.highest
        text = f"{style.text(label)}  last {number(last[1] if last else None)}"
        if low and high:
            text += f", least {number(low[1])} at {number(low[0])}, greatest {number(high[1])}"
        lines.append(f"  {style.paint(sign, color)} {_cut(text, style.width - 4)}")
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 3, 0)]}..."
