"""The CSV logger: Lightning's, with one row for each step, and appending instead of deleting."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment  # pyright: ignore[reportUnknownVariableType] -- Lightning leaves it untyped
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from nshtrainer.files import atomic_write_text

__all__ = ["MergingCSVLogger", "MergingWriter"]

_MAX_AGE_S = 5.0
"""A reader of the file is at most this far behind (one row, if nothing is logged)."""


class MergingWriter(ExperimentWriter):
    """Writes rows to `metrics.csv`; metrics of one step share a row, old rows stay.

    Args:
        log_dir: Folder of the file; made if missing.
        flush_every: How many finished rows are kept in memory before they are written.
    """

    def __init__(self, log_dir: str, flush_every: int = 100) -> None:
        self.flush_every = flush_every
        self._written_at = time.monotonic()
        self._new_hparams = False
        self._is_first_written = False
        """Whether the first row in memory is the last one in the file."""
        super().__init__(log_dir=log_dir)

    @override
    def _check_log_dir_exists(self) -> None:
        """Take over the header of an earlier session of this run (Lightning would delete the file)."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), list[str]())

    @override
    def log_hparams(self, params: dict[str, Any]) -> None:
        """Keep *params* for `hparams.yaml`, which is written with the first metrics.

        Lightning writes it anew at each call, which takes longer than all that comes before the first
        batch.
        """
        self.hparams.update(params)
        self._new_hparams = True

    @override
    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Add *metrics_dict* to the row of *step*; a value is a float or a 0-dim tensor."""
        values = {k: v.item() if hasattr(v, "item") else v for k, v in metrics_dict.items()}
        if step is None:
            step = int(self.metrics[-1]["step"]) + 1 if self.metrics else 0
        if self.metrics and self.metrics[-1]["step"] == step:
            self.metrics[-1].update(values)
        else:
            self.metrics.append({**values, "step": step})

    @override
    def save(self) -> None:
        """Write the finished rows if there are many or some are old; the last one may still grow."""
        if self.metrics:
            self._write_hparams()
        is_due = time.monotonic() - self._written_at > _MAX_AGE_S
        if len(self.metrics) > self.flush_every or is_due:
            self._write(self.metrics[:-1])
            self.metrics = self.metrics[-1:]

    def flush(self) -> None:
        """Write everything."""
        self._write_hparams()
        self._write(self.metrics)
        self.metrics = []

    def rewind(self, step: int) -> None:
        """Drop the rows from *step* on: a killed session wrote them after its last checkpoint."""
        self.flush()
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            text = file.read()
        # A row that a kill has cut off is none.
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        # What was logged before this call, at the end of an epoch that was over, is of a step too.
        merged: dict[str, dict[str, str]] = {}
        for row in rows:
            values = {k: v for k, v in row.items() if v}
            merged.setdefault(values.get("step", "0"), {"step": "0"}).update(values)
        kept = [row for row in merged.values() if int(row["step"]) < step]
        if len(kept) < len(rows) or not text.endswith("\n"):
            atomic_write_text(path, self._text(kept, header=True))
        if kept:
            last: dict[str, Any] = {**kept[-1], "step": int(kept[-1]["step"])}
            self.metrics = [last]  # may still grow, by the validation that follows it
            self._is_first_written = True

    def _write_hparams(self) -> None:
        if self._new_hparams:
            self._new_hparams = False
            super().log_hparams({})

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._written_at = time.monotonic()
        if not rows:
            return
        is_first_written, self._is_first_written = self._is_first_written, False
        path = Path(self.metrics_file_path)
        new = sorted({key for row in rows for key in row} - set(self.metrics_keys))
        if (new or is_first_written) and path.is_file() and self.metrics_keys:
            with path.open(newline="") as file:
                old = list(csv.DictReader(file))
            if is_first_written:
                old.pop()
            self.metrics_keys = sorted([*self.metrics_keys, *new])
            atomic_write_text(path, self._text([*old, *rows], header=True))
            return
        self.metrics_keys = sorted([*self.metrics_keys, *new])
        fresh = not path.is_file()
        with path.open("a", newline="") as file:
            file.write(self._text(rows, header=fresh))

    def _text(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, fieldnames=self.metrics_keys)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()


class MergingCSVLogger(CSVLogger):
    """Lightning's CSV logger with `MergingWriter`; its place is asked for at the first record.

    Args:
        save_dir: Returns the folder; called late, because the run's id may not be settled yet. It and
            `version` are pickled with the trainer, for processes that are spawned.
        name: Folder below it; "" is none.
        version: Returns the last folder's name; called late too.
        prefix: Put before every metric's name.
        flush_logs_every_n_steps: How many rows are kept in memory at most.
    """

    def __init__(
        self,
        save_dir: Callable[[], Path],
        *,
        name: str,
        version: Callable[[], str],
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(
            save_dir="", name=name, prefix=prefix, flush_logs_every_n_steps=flush_logs_every_n_steps
        )
        self._late_save_dir, self._late_version = save_dir, version

    @property
    @override
    def save_dir(self) -> str:
        """The folder of all names and versions."""
        return os.fspath(self._late_save_dir())

    @property
    @override
    def version(self) -> str:
        """The run's id."""
        return self._late_version()

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer; made, with its folder, when first asked for."""
        if self._experiment is None:
            self._experiment = MergingWriter(self.log_dir, self._flush_logs_every_n_steps)
        return self._experiment  # pyright: ignore[reportReturnType] -- Lightning types the attribute with Fabric's class

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows from *step* on, which a session that was killed left behind."""
        writer = cast("MergingWriter", self.experiment)
        writer.rewind(step)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; called by Lightning when a stage ends, by an exception too."""
        if isinstance(self._experiment, MergingWriter):
            self._experiment.flush()
