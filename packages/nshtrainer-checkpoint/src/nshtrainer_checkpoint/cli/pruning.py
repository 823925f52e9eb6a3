"""What `nshtrainer checkpoint prune` deletes: the retention of the callbacks, over whole runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint.metadata import Record
from nshtrainer_checkpoint.retention import Keep, decide
from nshtrainer_checkpoint.storage import remove

from .found import Found, latest_first

__all__ = ["Pruned", "Wish", "plan_pruning"]


@dataclass(frozen=True)
class Wish:
    """What is to stay of each run; None says nothing."""

    last: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    every_n_steps: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Pruned:
    """What goes and what stays, newest first."""

    removed: tuple[Found, ...]
    kept: tuple[Found, ...]
    freed: int
    """Bytes that come free: a file with other names keeps its place."""

    def carry_out(self) -> list[Path]:
        """Delete what goes; returns what could not be deleted."""
        return [f.path for f in self.removed if f.record is not None and not remove(f.record)]


def plan_pruning(found: Iterable[Found], wish: Wish) -> Pruned:
    """Decide for each run among *found*; deletes nothing.

    Checkpoints that can be resumed from and those of weights alone are counted apart. One that a
    link leads to is kept, and so is whatever is not whole.

    Raises:
        ConfigError: What is best is not known.
    """
    everything = latest_first(found)
    runs: dict[tuple[Path, str | None, bool], list[Found]] = {}
    for one in everything:
        if one.state == "ok" and one.record is not None:
            key = (one.group, one.record.run_id, one.record.weights_only)
            runs.setdefault(key, []).append(one)
    removed = {path for run in runs.values() for path in _removed(run, wish)}
    goes = tuple(f for f in everything if f.path in removed)
    return Pruned(goes, tuple(f for f in everything if f.path not in removed), _freed(goes))


def _freed(removed: Iterable[Found]) -> int:
    names: Counter[tuple[int, int]] = Counter()
    total = 0
    for found in removed:
        status = found.path.stat()
        names[status.st_dev, status.st_ino] += 1
        if found.path.is_dir() or names[status.st_dev, status.st_ino] == status.st_nlink:
            total += found.size
    return total


def _removed(run: list[Found], wish: Wish) -> set[Path]:
    linked = {f.path for f in run if f.links}
    records = [f.record for f in run if f.record is not None]
    keeps: list[tuple[Keep, list[Record]]] = []
    if wish.last is not None:
        keeps.append((Keep("newest", topk=wish.last), records))
    if wish.best is not None:
        metric, mode = _ranking(run, wish)
        ranked = [
            dataclasses.replace(f.record, value=_value(f, metric))
            for f in run
            if f.record is not None
        ]
        keeps.append((Keep("best", mode, topk=wish.best), ranked))
    stays = {r.path for keep, some in keeps for r in decide(some, keep).kept}
    if not keeps:
        stays = {r.path for r in records}
    milestones = Keep("newest", every_n_steps=wish.every_n_steps)
    stays |= linked | {r.path for r in records if milestones.is_milestone(r)}
    removed = {Path(str(r.path)) for r in records if r.path not in stays}
    if wish.max_bytes is not None:
        budget = dataclasses.replace(milestones, max_bytes=wish.max_bytes)
        rest = [r for r in records if r.path in stays]
        best = keeps[-1] if wish.best is not None else None
        if best is not None and wish.last is None:
            budget = dataclasses.replace(best[0], topk=None, max_bytes=wish.max_bytes)
            rest = [r for r in best[1] if r.path in stays]
        gone = decide(rest, budget, may_remove=lambda r: r.path not in linked).removed
        removed |= {Path(str(r.path)) for r in gone}
    return removed


def _ranking(run: list[Found], wish: Wish) -> tuple[str, Literal["min", "max"]]:
    """The metric to rank by, and which values are better."""
    known: dict[str, str] = {}
    for found in run:
        monitor = cast("dict[str, Any]", found.metadata.get("monitor") or {})
        if "name" in monitor:
            known[str(monitor["name"])] = str(monitor.get("mode"))
    name = run[0].run
    metric = wish.metric
    if metric is None:
        if len(known) != 1:
            there = f"it ranked by {', '.join(sorted(known))}" if known else "it ranked by none"
            raise ConfigError(f"what is best in run {name} is not clear: {there}; give --metric")
        metric = next(iter(known))
    mode = wish.mode or known.get(metric)
    if mode not in ("min", "max"):
        raise ConfigError(
            f"run {name} does not say whether small or large values of {metric!r} are better; give "
            "--mode min or --mode max"
        )
    if not any(_value(f, metric) is not None for f in run):
        there = sorted({key for f in run for key in _metrics(f)})
        raise ConfigError(
            f"no checkpoint of run {name} has a value of {metric!r}; there is "
            f"{', '.join(there) or 'none'}"
        )
    return metric, "min" if mode == "min" else "max"


def _metrics(found: Found) -> dict[str, Any]:
    metrics = found.metadata.get("metrics")
    return cast("dict[str, Any]", metrics) if isinstance(metrics, dict) else {}


def _value(found: Found, metric: str) -> float | None:
    value = _metrics(found).get(metric)
    return float(value) if isinstance(value, (int, float)) else None
