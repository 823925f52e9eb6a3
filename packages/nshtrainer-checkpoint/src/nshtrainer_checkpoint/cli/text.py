"""Checkpoints as lines for a person."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from nshtrainer.quantities import age_text, size_text

from .found import Found

__all__ = ["ages", "rows_of", "table"]

_HEAD = ("step", "epoch", "value", "size", "age", "state", "file")


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return *rows* under a head, in columns; the last one, the file, is as long as it is."""
    lines = [_HEAD, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD) - 1)]
    is_number = (True, True, False, True, True, False)
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=False)
        )
        + f"  {line[-1]}"
        for line in lines
    ]


def rows_of(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Return one row for each."""
    return [_row(f, age) for f, age in zip(found, ages(found), strict=True)]


def ages(found: Iterable[Found]) -> list[float | None]:
    """Return for each how many seconds ago its file was written."""
    now = time.time()
    return [None if f.modified is None else max(now - f.modified, 0.0) for f in found]


def _row(found: Found, age: float | None) -> tuple[str, ...]:
    record = found.record
    name = f"{found.path.parent.name}/{found.path.name}"
    if found.links:
        name += f"  <- {', '.join(found.links)}"
    if found.why:
        name += f"  ({found.why})"
    return (
        "" if record is None else str(record.step),
        "" if record is None else str(record.epoch),
        _value(found),
        size_text(found.size),
        age_text(age),
        "weights" if found.state == "ok" and record and record.weights_only else found.state,
        name,
    )


def _value(found: Found) -> str:
    record, monitor = found.record, found.metadata.get("monitor")
    if record is None or not isinstance(monitor, dict):
        return ""
    value = "none" if record.value is None else f"{record.value:.4g}"
    return f"{monitor['name']}={value}" if "name" in monitor else value
