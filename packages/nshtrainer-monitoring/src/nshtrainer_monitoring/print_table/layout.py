"""Rows of numbers as text, in columns that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nshtrainer.metric import MetricConfig

__all__ = ["COUNTERS", "Cell", "Layout", "cells_of", "format_change", "format_value"]

COUNTERS = ("epoch", "step")
"""The first columns: never best, and their change tells nothing."""

_VALUE_WIDTH = 10  # room for the widest number, so that rows printed apart line up
_CHANGE_WIDTH = 8


@dataclass(frozen=True)
class Cell:
    """A number in a row."""

    value: str
    is_best: bool = False
    """Whether no earlier row had a better one."""
    change: str = ""
    """From the row before."""
    is_better: bool | None = None
    """Whether the change is for the better; None where the direction is not known."""


def format_value(value: float | None) -> str:
    """Return *value* in at most 10 characters; `-` where there is none."""
    if value is None:
        return "-"
    if math.isfinite(value) and float(value).is_integer():
        text = str(int(value))
        return text if len(text) <= _VALUE_WIDTH else f"{float(value):.3e}"
    text = f"{value:.5g}"
    return text if len(text) <= _VALUE_WIDTH else f"{value:.3e}"


def format_change(value: float | None, before: float | None) -> str:
    """Return the signed difference in at most 8 characters; nothing where there is none."""
    if value is None or before is None or not math.isfinite(value - before) or value == before:
        return ""
    text = f"{value - before:+.2g}"
    return text if len(text) <= _CHANGE_WIDTH else f"{value - before:+.0e}"


def cells_of(
    row: Mapping[str, float],
    before: Mapping[str, float],
    best: Mapping[str, float],
    directions: Mapping[str, MetricConfig],
) -> dict[str, Cell]:
    """Describe each number of a row.

    Args:
        row: Numbers by column.
        before: The last number of each column in earlier rows.
        best: The best number of each column in earlier rows.
        directions: In which direction each metric gets better, where that is known.
    """
    cells: dict[str, Cell] = {}
    for name, value in row.items():
        if name in COUNTERS:
            cells[name] = Cell(format_value(value))
            continue
        change, metric = format_change(value, before.get(name)), directions.get(name)
        if metric is None:
            cells[name] = Cell(format_value(value), change=change)
            continue
        is_better = metric.is_better(value, before.get(name)) if change else None
        is_best = metric.is_better(value, best.get(name))
        cells[name] = Cell(format_value(value), is_best, change, is_better)
    return cells


@dataclass(frozen=True)
class Layout:
    """Widths of columns, and which of them stand beside each other.

    Args:
        columns: Names, in their order.
        width: Characters per line; what does not fit is continued in further blocks, each with at
            least one column. None: one line, however long.
        gap: Characters between two columns.
        with_change: Whether there is room for the change of a metric.
    """

    columns: Sequence[str]
    width: int | None = None
    gap: int = 2
    with_change: bool = True

    def parts(self, name: str) -> tuple[int, int]:
        """Return the widths of the number, and of the mark and change behind it."""
        behind = 0 if name in COUNTERS else 1 + (1 + _CHANGE_WIDTH) * self.with_change
        return max(_VALUE_WIDTH, len(name) - behind), behind

    def blocks(self) -> list[list[str]]:
        """Return the columns of each block."""
        return list(self._split())

    def _split(self) -> Iterator[list[str]]:
        present: list[str] = []
        used = 0
        for name in self.columns:
            needed = sum(self.parts(name)) + (self.gap if present else 0)
            if present and self.width is not None and used + needed > self.width:
                yield present
                present, used = [], 0
                needed -= self.gap
            present.append(name)
            used += needed
        if present:
            yield present
