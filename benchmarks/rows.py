"""What a benchmark says: rows, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .method import Comparison, Ratio, Settings

__all__ = ["Row", "as_json", "as_table", "row_of"]

Verdict = Literal["met", "missed", "no verdict", "quick", ""]


@dataclass(frozen=True)
class Row:
    """One competitor in one case of one benchmark.

    Attributes:
        benchmark: Its name.
        case: What was done.
        subject: Who did it.
        baseline: Whom it is compared with.
        value: The ratio of their wall times.
        spread: Half the interquartile range of the ratio over its median.
        limit: What the value must not exceed; None where it is only reported.
        verdict: `met`, `missed`, `no verdict` if the spread is too large, `quick` if the rounds were
            too few to judge, and nothing where there is no limit and the spread is small.
        cpu: The ratio of their CPU times.
        best: The ratio of their fastest samples.
        seconds: Median wall time of the subject; bytes where that is the unit.
        attempt: How many attempts it took.
        unit: What was measured: seconds, or bytes of memory.
    """

    benchmark: str
    case: str
    subject: str
    baseline: str
    value: float
    spread: float
    limit: float | None
    verdict: Verdict
    cpu: float | None
    best: float
    seconds: float
    attempt: int
    unit: Literal["s", "B"] = "s"


def row_of(
    benchmark: str, comparison: Comparison, subject: str, ratio: Ratio, settings: Settings
) -> Row:
    """The row for *subject* of *comparison*."""
    limit = comparison.limits.get(subject)
    return Row(
        benchmark=benchmark,
        case=comparison.case,
        subject=subject,
        baseline=comparison.baseline,
        limit=limit,
        verdict=_verdict(ratio, limit, settings),
        unit=comparison.unit,
        **asdict(ratio),
    )


def _verdict(ratio: Ratio, limit: float | None, settings: Settings) -> Verdict:
    if settings.is_quick:
        return "quick"
    if not ratio.is_steady:
        return "no verdict"
    if limit is None:
        return ""
    return "met" if ratio.value <= limit else "missed"


def as_json(rows: Iterable[Row], machine: dict[str, Any], settings: Settings) -> str:
    """Everything about one run of the benchmarks, as JSON."""
    document = {
        "machine": machine,
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


_HEAD = (
    "benchmark",
    "case",
    "subject",
    "over",
    "value",
    "spread",
    "limit",
    "verdict",
    "CPU",
    "best",
    "time",
)
_NUM_TEXTS = 4


def as_table(rows: Iterable[Row]) -> str:
    """A Markdown table, aligned so that it can be read as it is."""
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    rule = tuple("-" * w if i < _NUM_TEXTS else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join(_line(cells, widths) for cells in (lines[0], rule, *lines[1:]))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.benchmark, row.case, row.subject, row.baseline, _ratio(row.value),
        f"{row.spread:.0%}", _ratio(row.limit), row.verdict, _ratio(row.cpu), _ratio(row.best),
        _time(row.seconds) if row.unit == "s" else f"{row.seconds / 1e6:.3g} MB",
    )  # fmt: skip


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (
        cell.ljust(width) if i < _NUM_TEXTS else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(padded)} |"


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _time(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
