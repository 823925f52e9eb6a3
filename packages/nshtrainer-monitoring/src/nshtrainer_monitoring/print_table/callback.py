"""Prints a row of metrics after each validation."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.step_metrics import fetch

from .config import PrintTableMetricsCallbackConfig
from .directions import directions_of
from .layout import COUNTERS, Cell, Layout, cells_of
from .rendering import NotebookTable, as_html, as_plain_text, as_terminal_text

if TYPE_CHECKING:
    from nshtrainer.metric import MetricConfig

__all__ = ["PrintTableMetricsCallback"]

_ROWS_PER_HEADER = 20
_GAP, _RULED_GAP = 2, 3


class PrintTableMetricsCallback(ConfiguredCallback[PrintTableMetricsCallbackConfig]):
    """Prints `trainer.callback_metrics` on rank zero; see `PrintTableMetricsCallbackConfig`.

    State: the columns, the last rows and the best values.

    Args:
        config: The configuration.
        primary_metric: The run's main metric, whose direction is known.
        options: The configuration's fields, if none is given.
    """

    config_class = PrintTableMetricsCallbackConfig

    def __init__(
        self,
        config: PrintTableMetricsCallbackConfig | None = None,
        *,
        primary_metric: MetricConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self._known = [*self.config.metrics, *([primary_metric] if primary_metric else [])]
        self._columns = list(COUNTERS)
        self._rows: deque[dict[str, float]] = deque(maxlen=self.config.max_rows)
        self._best: dict[str, float] = {}
        self._modes: dict[str, str] = {}
        self._until_header = 0
        self._notebook: NotebookTable | None = None

    @property
    def rows(self) -> list[dict[str, float]]:
        """The last rows, oldest first, those from before a resume included."""
        return [dict(row) for row in self._rows]

    @property
    def best(self) -> dict[str, float]:
        """The best value so far of each metric whose direction is known."""
        return dict(self._best)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "columns": list(self._columns),
            "rows": self.rows,
            "best": self.best,
            "modes": dict(self._modes),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._columns = list(state_dict.get("columns", self._columns))
        self._rows = deque(state_dict.get("rows", ()), maxlen=self.config.max_rows)
        self._best = dict(state_dict.get("best", {}))
        self._modes = dict(state_dict.get("modes", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Copy without the notebook's output."""
        return {**vars(self), "_notebook": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._until_header = 0
        self._notebook = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_validation_epoch_end: the module's own hook of that name may still log.
        if not self.config.enabled or trainer.sanity_checking or not trainer.is_global_zero:
            return
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row |= self._metrics(trainer)
        directions = directions_of(trainer, self._known)
        self._forget_turned(directions)
        new = [name for name in row if name not in self._columns]
        self._columns += sorted(new)
        cells = cells_of(row, self._last_values(), self._best, directions)
        self._rows.append(row)
        for name, cell in cells.items():
            if cell.is_best:
                self._best[name], self._modes[name] = row[name], directions[name].mode
        self._show(trainer, cells, directions, columns_changed=bool(new))

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        patterns = self.config.metric_patterns
        metrics = {
            name: torch.as_tensor(value)
            for name, value in trainer.callback_metrics.items()
            if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        scalars = {name: value for name, value in metrics.items() if value.numel() == 1}
        return dict(zip(scalars, fetch(list(scalars.values())), strict=True))

    def _forget_turned(self, directions: Mapping[str, MetricConfig]) -> None:
        """What was best when the other direction was the better one is not; the rows tell anew."""
        for name, metric in directions.items():
            if name in self._columns and self._modes.get(name) != metric.mode:
                best = metric.best(row.get(name) for row in self._rows)
                self._best.pop(name, None)
                self._modes[name] = metric.mode
                if best is not None:
                    self._best[name] = best

    def _last_values(self) -> dict[str, float]:
        last: dict[str, float] = {}
        for row in self._rows:
            last |= row
        return last

    def _show(
        self,
        trainer: Trainer,
        cells: Mapping[str, Cell],
        directions: Mapping[str, MetricConfig],
        *,
        columns_changed: bool,
    ) -> None:
        from rich.console import Console

        console = Console()
        if console.is_jupyter:
            self._show_in_notebook(directions)
            return
        is_terminal = console.is_terminal
        layout = Layout(
            self._columns,
            console.width if is_terminal else None,
            gap=_RULED_GAP if is_terminal else _GAP,
            with_change=self.config.show_change,
        )
        with_header = columns_changed or self._until_header == 0 or len(layout.blocks()) > 1
        if with_header:
            self._until_header = _ROWS_PER_HEADER
        self._until_header -= 1
        if is_terminal:
            text = as_terminal_text(console, layout, cells, with_header=with_header)
        else:
            text = as_plain_text(layout, cells, with_header=with_header)
        _print(trainer, text)

    def _show_in_notebook(self, directions: Mapping[str, MetricConfig]) -> None:
        if self._notebook is None:
            self._notebook = NotebookTable(import_module("IPython.display").display)
        rows: list[dict[str, Cell]] = []
        before: dict[str, float] = {}
        left = dict(self._best)  # a table that is drawn anew marks the best of all, once
        for row in self._rows:
            shown = cells_of(row, before, {}, directions)
            for name, cell in shown.items():
                is_best = row[name] == left.get(name)
                if is_best:
                    del left[name]
                change = cell.change if self.config.show_change else ""
                shown[name] = replace(cell, is_best=is_best, change=change)
            rows.append(shown)
            before |= row
        layout = Layout(self._columns, gap=_GAP, with_change=self.config.show_change)
        lines = [as_plain_text(layout, row, with_header=not i) for i, row in enumerate(rows)]
        self._notebook.show(as_html(self._columns, rows), "\n".join(lines))


def _print(trainer: Trainer, text: str) -> None:
    """Print above a progress bar, if there is one, so that neither breaks the other."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar):
        # Lightning's own `print` of this bar says nothing where the bar has just been closed.
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        Tqdm.write(text)  # pyright: ignore[reportUnknownMemberType] -- tqdm has no types
    elif bar is not None and getattr(bar, "is_enabled", True):  # a silenced bar prints nothing
        bar.print(text)
    else:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
