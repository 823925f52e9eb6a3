"""Rows of numbers as text, in columns that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Block", "format_value", "lay_out"]

_MIN_WIDTH = 10  # room for the widest number, so that rows printed apart line up
_GAP = "  "


@dataclass(frozen=True)
class Block:
    """Columns that fit beside each other."""

    header: str
    row: str


def format_value(value: float | None) -> str:
    """Return *value* in at most 10 characters; `-` where there is none."""
    if value is None:
        return "-"
    if math.isfinite(value) and float(value).is_integer():
        text = str(int(value))
        return text if len(text) <= _MIN_WIDTH else f"{float(value):.3e}"
    text = f"{value:.5g}"
    return text if len(text) <= _MIN_WIDTH else f"{value:.3e}"


def lay_out(
    columns: Sequence[str], row: Mapping[str, float], width: int | None = None
) -> list[Block]:
    """Lay out one row.

    Args:
        columns: Names, in their order.
        row: Values by name; columns without one show `-`.
        width: Characters per line; what does not fit is continued in further blocks, each with
            at least one column. None: one line, however long.
    """
    blocks: list[Block] = []
    for names in _split(columns, width):
        widths = [max(len(name), _MIN_WIDTH) for name in names]
        header = _GAP.join(name.rjust(w) for name, w in zip(names, widths, strict=True))
        cells = (format_value(row.get(name)) for name in names)
        blocks.append(
            Block(header, _GAP.join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)))
        )
    return blocks


def _split(columns: Sequence[str], width: int | None) -> Iterator[list[str]]:
    present: list[str] = []
    used = 0
    for name in columns:
        needed = max(len(name), _MIN_WIDTH) + (len(_GAP) if present else 0)
        if present and width is not None and used + needed > width:
            yield present
            present, used = [], 0
            needed -= len(_GAP)
        present.append(name)
        used += needed
    if present:
        yield present
