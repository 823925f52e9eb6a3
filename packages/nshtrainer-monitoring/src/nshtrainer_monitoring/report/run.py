"""All that the files of one run tell: its record, configuration, metrics and checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

from nshtrainer.config_files import load_mapping, read_text
from nshtrainer.errors import ConfigFileError
from nshtrainer.run import redact

from .checkpoints import Saved, read_checkpoints
from .metrics_file import Metrics, find_files, read_metrics
from .places import newest_write

__all__ = ["RunData", "read_run", "tell_apart"]

_QUIET_S: Final = 600.0
"""After this time without a write a run that says that it is running is doubted."""


@dataclass
class RunData:
    """A run as it is told by its files; what is missing there is empty here."""

    root: Path
    record: dict[str, Any]
    """`run.json`."""
    config: dict[str, Any]
    config_source: str
    """The file that the configuration is from; "" if there is none."""
    metrics: Metrics
    checkpoints: list[Saved]
    written: float
    """When a file was written last, in seconds since the epoch."""
    notes: list[str] = field(default_factory=list[str])
    label: str = ""
    """What to call it beside other runs; see `tell_apart`."""

    @property
    def id(self) -> str:
        """The run's id, or else the name of its folder."""
        return str(self.record.get("id") or self.root.name)

    @property
    def title(self) -> str:
        """The run's name, or else its id."""
        return str(self.record.get("name") or self.id)

    @property
    def status(self) -> str:
        """How it ended, or whether it goes on: `finished`, `running`, `stopped by ...`, `silent`, `unknown`."""
        status = str(self.record.get("status") or "unknown")
        quiet = time.time() - self.written > _QUIET_S
        return "silent" if status == "running" and quiet else status

    @property
    def environment(self) -> dict[str, Any]:
        """What it ran in."""
        return _mapping(self.record.get("environment"))

    @property
    def plugins(self) -> dict[str, Any]:
        """Distribution -> version."""
        return _mapping(self.record.get("plugins"))

    @property
    def callbacks(self) -> list[str]:
        """The classes of its callbacks."""
        names = self.record.get("callbacks")
        return [str(n) for n in cast("list[Any]", names)] if isinstance(names, list) else []

    @property
    def primary(self) -> tuple[str, str] | None:
        """The primary metric and its mode: the configured one, or what a best checkpoint ranks by."""
        chosen = _mapping(self.config.get("primary_metric"))
        if isinstance(name := chosen.get("name", chosen.get("monitor")), str):
            return name, str(chosen.get("mode") or "min")
        return next(((s.metric, s.mode or "min") for s in self.checkpoints if s.metric), None)

    @property
    def started(self) -> datetime | None:
        """When its last session began."""
        try:
            return datetime.fromisoformat(str(self.environment.get("time")))
        except ValueError:
            return None

    @property
    def seconds(self) -> float | None:
        """For how long it was trained, as far as a checkpoint tells."""
        return max((s.seconds for s in self.checkpoints if s.seconds is not None), default=None)


def tell_apart(runs: Sequence[RunData]) -> None:
    """Label each run by its title, and by more where two have the same."""
    titles = [run.title for run in runs]
    longer = [
        run.title if titles.count(run.title) == 1 else f"{run.title} {run.id}" for run in runs
    ]
    for run, label in zip(runs, longer, strict=True):
        run.label = label if longer.count(label) == 1 else str(run.root)


def read_run(root: Path) -> RunData:
    """Read the run *root*; what is missing or damaged is said in the notes, and no error."""
    notes: list[str] = []
    record = _record(root, notes)
    metrics = read_metrics(find_files(root))
    checkpoints = read_checkpoints(root)
    config, source = _config(root, metrics, checkpoints, notes)
    if not metrics.files:
        notes.append("there is no metrics.csv: no CSV logger was on, or nothing was logged yet")
    run = RunData(
        root=root,
        record=record,
        config=config,
        config_source=source,
        metrics=metrics,
        checkpoints=checkpoints,
        written=newest_write(root),
        notes=[*notes, *metrics.notes],
    )
    if run.status == "silent":
        run.notes.append(
            "it says that it is running, and nothing was written for a while: it was killed, or is busy"
        )
    return run


def _record(root: Path, notes: list[str]) -> dict[str, Any]:
    path = root / "run.json"
    try:
        data: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(
            "there is no run.json: it was made by a plain Lightning trainer, or ended early"
        )
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"run.json cannot be read: {type(error).__name__}")
        return {}
    record = _mapping(data)
    # Names of packages are no secrets, however they sound; core has redacted the rest already.
    environment = _mapping(record.get("environment"))
    clean = {**redact({k: v for k, v in environment.items() if k != "packages"})}
    if "packages" in environment:
        clean["packages"] = environment["packages"]
    rest = {k: v for k, v in record.items() if k not in ("environment", "plugins")}
    return {**redact(rest), "environment": clean, "plugins": _mapping(record.get("plugins"))}


def _config(
    root: Path, metrics: Metrics, checkpoints: list[Saved], notes: list[str]
) -> tuple[dict[str, Any], str]:
    """The recorded configuration without secrets, and where it is from; the first that can be read."""
    hparams = [path.parent / "hparams.yaml" for path in reversed(metrics.files)]
    for path in (root / "config.yaml", *hparams):
        if not path.is_file():
            continue
        try:
            found = load_mapping(read_text(path), "yaml", source=path.name)
        except ConfigFileError as error:
            notes.append(str(error).partition("\n")[0])
            continue
        if found:
            return redact(_unwrapped(found)), path.relative_to(root).as_posix()
    saved = next((s for s in checkpoints if s.config), None)
    if saved is not None and saved.config is not None:
        return redact(saved.config), f"{saved.path.name}.metadata.json"
    notes.append("there is no configuration")
    return {}, ""


def _unwrapped(found: dict[str, Any]) -> dict[str, Any]:
    """Loggers are given the configuration as `trainer`, beside what the module says of itself."""
    trainer = _mapping(found.get("trainer"))
    return {**trainer, **{k: v for k, v in found.items() if k != "trainer"}} if trainer else found


def _mapping(value: Any) -> dict[str, Any]:
    return (
        {str(k): v for k, v in cast("Mapping[Any, Any]", value).items()}
        if isinstance(value, Mapping)
        else {}
    )
