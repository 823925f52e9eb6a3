"""Reads `metrics.csv` as the CSV loggers leave it: finished, being written, or cut off by a kill."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Final

from .series import POINTS_KEPT, Series

__all__ = ["STEP", "Metrics", "find_files", "read_metrics"]

STEP: Final = "step"
_FILE: Final = "metrics.csv"
_POINTS: Final = 4_000_000
"""How many are kept at once, over all metrics of a file: 16 bytes each."""
_CELLS: Final = 20_000
"""How many are read before they are taken in."""
_NOT_OURS: Final = ("checkpoint", "checkpoints", "wandb", "ema")


@dataclass
class Metrics:
    """All series of a run."""

    series: dict[str, Series] = field(default_factory=dict[str, Series])
    """By metric, in the order of the columns."""
    rows: int = 0
    files: list[Path] = field(default_factory=list[Path])
    """What was read, the oldest first."""
    notes: list[str] = field(default_factory=list[str])
    """What a reader of the report should know about the data."""

    @property
    def last_step(self) -> float | None:
        """The greatest step with a value."""
        return max((s.xs[-1] for s in self.series.values() if s.xs), default=None)


def find_files(root: Path) -> list[Path]:
    """Return the metrics files of the run *root*, the one written last at the end."""
    found: list[tuple[int, str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(n for n in folders if n not in _NOT_OURS and not n.startswith("."))
        if _FILE in files:
            path = Path(folder) / _FILE
            try:
                found.append((path.stat().st_mtime_ns, str(path), path))
            except OSError:  # gone since the folder was read
                continue
    return [path for _, _, path in sorted(found)]


def read_metrics(files: Sequence[Path]) -> Metrics:
    """Read *files*, which are one run's; where two have a step of a metric, the later file counts.

    Rows are streamed, so a file may be larger than the memory. A last line without its end is left
    out: its numbers may lack digits.
    """
    whole = Metrics()
    for path in files:
        try:
            found = _read(path)
        except OSError as error:
            whole.notes.append(f"{path.name} cannot be read: {error.strerror or error}")
            continue
        whole.files.append(path)
        whole.rows += found.rows
        whole.notes += [f"{path.parent.name}/{path.name}: {note}" for note in found.notes]
        for name, series in found.series.items():
            if name in whole.series:
                whole.series[name].extend(series)
            else:
                whole.series[name] = series
    if len(whole.files) > 1:
        whole.notes.append(f"{len(whole.files)} metrics files; at the same steps the latest counts")
    return whole


def _read(path: Path) -> Metrics:
    result = Metrics()
    lines = _Lines(path)
    rows = csv.reader(lines)
    try:
        header = next(rows, list[str]())
        _read_rows(header, rows, result)
    except csv.Error as error:
        result.notes.append(f"line {rows.line_num} is no CSV ({error}); what follows is left out")
    if lines.cut_off:
        result.notes.append("the last line was not finished and is left out")
    if lines.with_nul:
        result.notes.append(f"{lines.with_nul} damaged lines are left out")
    return result


class _Lines:
    """The lines of a file that are whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cut_off = False
        self.with_nul = 0

    def __iter__(self) -> Iterator[str]:
        return self._lines()

    def _lines(self) -> Generator[str]:
        with self._path.open(encoding="utf-8", errors="replace", newline="") as file:
            for line in file:
                if "\0" in line:  # a block that a file system never got to write
                    self.with_nul += 1
                elif not line.endswith(("\n", "\r")):
                    self.cut_off = True
                else:
                    yield line


def _read_rows(header: list[str], rows: Iterator[list[str]], result: Metrics) -> None:
    at = header.index(STEP) if STEP in header else None
    if at is None and header:
        result.notes.append(f"there is no column {STEP!r}; rows are counted instead")
    buckets = max(20, min(1000, _POINTS // (POINTS_KEPT * max(len(header), 1))))
    columns = [Series(name, buckets) for name in header]
    taken = _Taken(at, columns)
    try:
        for batch in _batches(rows, max(1, _CELLS // max(len(header), 1))):
            taken.take(batch)
    finally:
        result.rows = taken.rows
        for i, series in enumerate(columns):
            if i != at and series.xs:
                result.series.setdefault(series.name, series)
        if taken.went_back:
            result.notes.append("the steps go back, as when a run is resumed; the later rows count")
        if taken.bad:
            result.notes.append(f"{taken.bad} cells or rows are no numbers and are left out")


def _batches(rows: Iterator[list[str]], size: int) -> Generator[list[list[str]]]:
    """*rows* in lists of *size*; an error comes after the rows before it."""
    batch: list[list[str]] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
    except csv.Error:
        yield batch
        raise
    yield batch


class _Taken:
    """Takes rows into columns: many at once where their steps ascend, as they mostly do.

    Args:
        at: Index of the column of steps; None counts rows.
        columns: One for each cell of a row.
    """

    def __init__(self, at: int | None, columns: list[Series]) -> None:
        self._at, self._columns = at, columns
        self._last = -math.inf
        self.rows = self.bad = 0
        self.went_back = False

    def take(self, batch: list[list[str]]) -> None:
        """Add whole rows."""
        whole = [row for row in batch if len(row) == len(self._columns)]
        self.bad += sum(1 for row in batch if row) - len(whole)
        if self._at is None:
            steps = [float(self.rows + i) for i in range(len(whole))]
        else:
            steps = [_number(row[self._at]) for row in whole]
            good = [math.isfinite(step) for step in steps]
            if not all(good):
                whole, steps = [*compress(whole, good)], [*compress(steps, good)]
                self.bad += good.count(False)
        self.rows += len(whole)
        for start, end in self._ascending(steps):
            self._take(whole[start:end], steps[start:end])

    def _ascending(self, steps: list[float]) -> Iterator[tuple[int, int]]:
        """Stretches in which the steps do not go back."""
        start, before = 0, self._last
        for i, step in enumerate(steps):
            if step < before:
                self.went_back = True
                yield start, i
                start = i
            before = step
        if steps:
            self._last = before
            yield start, len(steps)

    def _take(self, rows: list[list[str]], steps: list[float]) -> None:
        turned: Iterator[tuple[str, ...]] = zip(*rows, strict=True)
        for i, (series, cells) in enumerate(zip(self._columns, turned, strict=False)):
            if i != self._at:
                self._take_column(series, cells, steps)

    def _take_column(self, series: Series, cells: Sequence[str], steps: Sequence[float]) -> None:
        if "" in cells:  # not logged at this step
            steps, cells = [*compress(steps, cells)], [cell for cell in cells if cell]
        try:
            values = [*map(float, cells)]
        except ValueError:
            good = [_is_number(cell) for cell in cells]
            self.bad += good.count(False)
            steps, values = [*compress(steps, good)], [*map(float, compress(cells, good))]
        if values:
            series.add_all(steps, values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> float:
    return float(text) if _is_number(text) else math.nan
