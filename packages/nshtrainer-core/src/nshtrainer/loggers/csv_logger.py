"""The CSV logger: Lightning's, with one row for each step, and appending instead of deleting."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment  # pyright: ignore[reportUnknownVariableType] -- Lightning leaves it untyped
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from nshtrainer.files import atomic_write_text

__all__ = ["MergingCSVLogger", "MergingWriter"]

log = logging.getLogger(__name__)

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
            try:
                with path.open(newline="") as file:
                    self.metrics_keys = next(csv.reader(file), list[str]())
            except (csv.Error, UnicodeDecodeError) as error:
                self._set_aside(path, f"is no CSV ({error})")
            if self.metrics_keys and "step" not in self.metrics_keys:
                self._set_aside(path, "has no column 'step'")

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
        """Drop the rows from *step* on: a killed session wrote them after its last checkpoint.

        Rows whose step is no whole number, from an editor, stay as they are, and a warning counts
        them. A file that is no CSV is kept beside the new one that is begun.
        """
        self.flush()
        path = Path(self.metrics_file_path)
        rows, is_whole = self._read(path)
        # What was logged before this call, at the end of an epoch that was over, is of a step too.
        merged: dict[int | str, dict[str, str]] = {}
        strange: list[str] = []
        for number, row in enumerate(rows):
            at = _step_of(row)
            if at is None:
                strange.append(row.get("step", ""))
                merged[f"row {number}"] = row
            else:
                merged.setdefault(at, {}).update(row, step=str(at))
        if strange:
            log.warning(
                "%d rows of %s have a step that is no whole number, the first one %r; they are kept as "
                "they are. Correct or delete them if they should be part of a curve.",
                len(strange),
                path,
                strange[0],
            )
        kept = {at: row for at, row in merged.items() if isinstance(at, str) or at < step}
        last = next((at for at in reversed(kept) if isinstance(at, int)), None)
        if last is not None:
            kept[last] = kept.pop(last)  # to the end
        if list(kept.values()) != rows or not is_whole:
            atomic_write_text(path, self._text(list(kept.values()), header=True))
        if last is not None:
            newest: dict[str, Any] = {**kept[last], "step": last}
            self.metrics = [newest]  # may still grow, by the validation that follows it
            self._is_first_written = True

    def _read(self, path: Path) -> tuple[list[dict[str, str]], bool]:
        """Return the rows of *path*, without empty cells, and whether its last one is whole.

        A row that a kill has cut off is none. A file that is no CSV any more is kept under another
        name, and has no rows.
        """
        if not path.is_file():
            return [], True
        try:
            with path.open(newline="") as file:
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            rows = cast(
                "Iterator[dict[str | None, str]]", csv.DictReader(io.StringIO(whole, newline=""))
            )
            # What an editor has put beyond the last column has no name.
            return [
                {k: cell for k, cell in row.items() if k and cell} for row in rows
            ], whole == text
        except (csv.Error, UnicodeDecodeError) as error:
            self._set_aside(path, f"is no CSV ({error})")
            return [], True

    def _set_aside(self, path: Path, problem: str) -> None:
        aside = path.with_name(f"{path.stem}-damaged-{time.time_ns()}{path.suffix}")
        path.replace(aside)
        self.metrics_keys = []
        log.warning("%s %s; it is kept as %s, and a new one is begun", path, problem, aside)

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
            old, _ = self._read(path)
            if is_first_written:
                old = old[:-1]
            new = sorted({key for row in rows for key in row} - set(self.metrics_keys))
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


def _step_of(row: Mapping[str, str]) -> int | None:
    """Return the step of *row*, None if it has none or it is no whole number."""
    try:
        step = float(row.get("step", ""))
    except ValueError:
        return None
    return int(step) if step.is_integer() else None


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
