"""Trains, kills the process, and counts what a reader finds.

A kill comes at a random moment after the first (in a loop, the first new) checkpoint, or at the k-th
file event of one save, for every k. *Fresh* is a new folder each time; a *loop* goes on in the same
one. Temporary files lie on the *same* file system as the checkpoints, or *cross*, on another one.
After each kill a process starts again and tells where it goes on, and what is still left then.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from .check import Found, tree_bytes
from .child import Child, Plan, Probe, end, fork, listen, survey_of, train

__all__ = ["ROWS", "Cell", "Report", "run_kills"]

ROWS = (
    "last not resumable",
    "last dangling",
    "last missing",
    "last torn",
    "no loadable file",
    "best missing",
    "best torn",
    "torn under a final name",
    "file without metadata",
    "metadata without file",
    "metadata unreadable",
    "metadata lying",
    "resumed behind the newest",
    "poisoned restarts",
    "left after the next start",
)
"""What must never be; each kill adds 0 or 1 to a row."""

NOTES = (
    "link behind the newest",
    "link behind after the start",
    "in flight",
    "most files at once",
    "left in temp, mean MB",
)
"""What is told beside them. Links move after the commit, and `last.ckpt` leads into its own folder
where the newest checkpoint may be the best one; `ckpt_path="last"` goes by the metadata."""


@dataclass
class Cell:
    """The counts of one way to kill."""

    name: str
    kills: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    most_files: int = 0
    temp_bytes: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The first kills that counted in a row, with all that was found."""

    @property
    def values(self) -> dict[str, float]:
        """Row -> value, the notes among them."""
        return {
            **{row: self.counts[row] for row in (*ROWS, *NOTES[:3])},
            NOTES[3]: self.most_files,
            NOTES[4]: round(self.temp_bytes / max(1, self.kills) / 1e6, 2),
        }


@dataclass
class Report:
    """All cells of a run of kills."""

    subject: str
    cells: list[Cell]
    events: list[str]
    """The file events of one save, in order."""

    @property
    def kills(self) -> int:
        """How many there were."""
        return sum(c.kills for c in self.cells)

    @property
    def is_clean(self) -> bool:
        """Whether every row is 0."""
        return not any(c.counts[row] for c in self.cells for row in ROWS)

    def as_json(self) -> str:
        """Everything, for a file."""
        cells = {c.name: {"kills": c.kills, **c.values, "bad": c.bad} for c in self.cells}
        return json.dumps(
            {"subject": self.subject, "kills": self.kills, "cells": cells, "events": self.events},
            indent=1,
        )

    def as_table(self) -> str:
        """A Markdown table."""
        lines = [
            f"| {self.subject} | " + " | ".join(c.name for c in self.cells) + " |",
            "|---|" + "---|" * len(self.cells),
            "| kills | " + " | ".join(str(c.kills) for c in self.cells) + " |",
        ]
        lines += [
            f"| {row} | " + " | ".join(f"{c.values[row]:g}" for c in self.cells) + " |"
            for row in (*ROWS, *NOTES)
        ]
        return "\n".join(lines)


def run_kills(
    plan: Plan,
    kills: int,
    *,
    seed: int = 0,
    window: float = 0.7,
    other: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Kill *kills* trainings like *plan* in folders below its root, which must exist.

    Args:
        plan: Subject and size.
        kills: At every file event of a save first; what remains is spread over the four cells.
        seed: Of the random moments.
        window: Seconds after the first checkpoint in which a random moment lies.
        other: A folder on another file system; None leaves out those cells.
        say: Told of progress.
    """
    moments = random.Random(seed)  # noqa: S311 -- moments, no secrets
    every = Cell("every file event")
    events = _kill_at_events(plan, every, kills)
    report = Report(plan.subject, [every], events)
    say(f"{every.kills} kills at file events")
    places = {"same": None} if other is None else {"same": None, "cross": other}
    cells = [(kind, place) for kind in ("fresh", "loop") for place in places]
    rest = max(0, kills - every.kills)
    for index, (kind, place) in enumerate(cells):
        cell = Cell(f"{kind} {place}")
        report.cells.append(cell)
        share = rest // len(cells) + (index < rest % len(cells))
        _kill_at_moments(plan, cell, share, kind, places[place], moments, window)
        say(f"{cell.kills} kills, {cell.name}")
    return report


def _kill_at_events(plan: Plan, cell: Cell, kills: int) -> list[str]:
    """Kill at every file event of the save after step 4 (best and last), then of 5 (last alone)."""
    all_events: list[str] = []
    for step in (3, 4):
        counted = replace(plan, kill_step=step, max_steps=step + 2)
        with _folder(counted) as here:
            child = _start(here, "count")
            events = next((t["events"] for t in listen(child) if t["event"] == "counted"), [])
            end(child)
        all_events += events
        for number in range(1, len(events) + 1):
            if cell.kills == kills:
                return all_events
            with _folder(replace(counted, kill_event=number)) as here:
                child = _start(here, f"event {number}")
                for _ in listen(child):
                    pass
                end(child)
                _judge(here, cell, f"step {step + 1}, event {number}: {events[number - 1]}")
    return all_events


def _kill_at_moments(
    plan: Plan,
    cell: Cell,
    kills: int,
    kind: str,
    tempdir: Path | None,
    moments: random.Random,
    window: float,
) -> None:
    with contextlib.ExitStack() as stack:
        here = plan
        for number in range(kills):
            if number == 0 or kind == "fresh":
                stack.close()
                here = stack.enter_context(_folder(plan, tempdir))
            resumes = kind == "loop" and number > 0
            child = _start(replace(here, resume=resumes), f"kill {number}")
            for told in listen(child):
                if told["event"] == "saved":
                    break
            after = moments.uniform(0, window)
            time.sleep(after)
            code = end(child)
            _judge(here, cell, f"kill {number}, {after:.3f} s after a checkpoint", code)


@contextlib.contextmanager
def _folder(plan: Plan, tempdir: Path | None = None) -> Iterator[Plan]:
    """*plan* in a folder of its own, with another one for temporary files; both are removed."""
    root = Path(mkdtemp(prefix="run-", dir=plan.root))
    temporary = Path(mkdtemp(prefix="faults-", dir=tempdir or plan.root))
    try:
        yield replace(plan, root=root, tempdir=temporary)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _start(plan: Plan, title: str) -> Child:
    log = plan.root / "log.txt"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"---- {title}\n")
    return fork(lambda tell: _train(plan, tell), log)


def _train(plan: Plan, tell: Callable[[dict[str, Any]], None]) -> None:
    train(plan, Probe(plan, tell))


def _judge(plan: Plan, cell: Cell, what: str, code: int = -signal.SIGKILL) -> None:
    """Look at what a kill left, start again, and count."""
    found = survey_of(plan)
    cell.kills += 1
    cell.most_files = max(cell.most_files, len(found.files))
    if plan.tempdir is not None:
        cell.temp_bytes += found.bytes_left + tree_bytes(plan.tempdir)
    start, ended = _restart(plan)
    rows = {
        **_rows_of(found),
        "poisoned restarts": code != -signal.SIGKILL or ended != 0 or start is None,
        # A start may commit what a killed process had almost committed; that counts as well.
        "resumed behind the newest": start is not None
        and start["step"] < max(found.newest, start["newest"]),
        "left after the next start": start is not None and _is_unclean(plan, start),
        "link behind the newest": found.last.is_ok and found.last.step < found.newest,
        "link behind after the start": start is not None and start["last"] < start["newest"],
        "in flight": bool(found.in_flight),
    }
    cell.counts.update(row for row, counts in rows.items() if counts)
    counted = [row for row in ROWS if rows[row]]
    if counted and len(cell.bad) < 10:
        log = (plan.root / "log.txt").read_text(encoding="utf-8", errors="replace")
        cell.bad.append(
            {
                "what": what,
                "rows": counted,
                "files": {n: list(s) for n, s in found.files.items()},
                "faults": found.faults,
                "start": start,
                "log": log[-2000:],
            }
        )


def _restart(plan: Plan) -> tuple[dict[str, Any] | None, int]:
    """Where a new process goes on, and its exit code; it ends before its first step."""
    child = _start(replace(plan, resume=True, only_start=True, kill_step=None), "restart")
    told = next((t for t in listen(child) if t["event"] == "start"), None)
    for _ in listen(child):
        pass
    return told, end(child)


def _is_unclean(plan: Plan, start: dict[str, Any]) -> bool:
    if plan.subject == "lightning":  # it keeps no such promise: only what it left is counted
        return bool(start["leftovers"])
    return bool(start["leftovers"] or start["faults"])


def _rows_of(found: Found) -> dict[str, bool]:
    last, best = found.last.state, found.best.state
    return {
        "last not resumable": last != "ok",
        "last dangling": last == "dangling",
        "last missing": last == "missing",
        "last torn": last in ("torn", "mixed"),
        "no loadable file": not any(seen.is_ok for seen in found.files.values()),
        "best missing": best in ("missing", "dangling"),
        "best torn": best in ("torn", "mixed"),
        "torn under a final name": bool(found.torn),
        "file without metadata": bool(found.without_metadata),
        "metadata without file": bool(found.without_file),
        "metadata unreadable": bool(found.unreadable),
        "metadata lying": bool(found.lying),
    }
