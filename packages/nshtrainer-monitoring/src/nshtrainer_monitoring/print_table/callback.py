"""Prints a row of metrics after each validation."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.step_metrics import fetch

from .config import PrintTableMetricsCallbackConfig
from .layout import Block, lay_out

__all__ = ["PrintTableMetricsCallback"]

_HISTORY = 100
_ROWS_PER_HEADER = 20


class PrintTableMetricsCallback(ConfiguredCallback[PrintTableMetricsCallbackConfig]):
    """Prints `trainer.callback_metrics` on rank zero; see `PrintTableMetricsCallbackConfig`.

    State: the columns and the last 100 rows.
    """

    config_class = PrintTableMetricsCallbackConfig

    def __init__(
        self, config: PrintTableMetricsCallbackConfig | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self._columns = ["epoch", "step"]
        self._rows: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self._until_header = 0

    @property
    def rows(self) -> list[dict[str, float]]:
        """The last 100 rows, oldest first, those from before a resume included."""
        return [dict(row) for row in self._rows]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"columns": list(self._columns), "rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._columns = list(state_dict.get("columns", self._columns))
        self._rows = deque(state_dict.get("rows", ()), maxlen=_HISTORY)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._until_header = 0

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_validation_epoch_end: the module's own hook of that name may still log.
        if not self.config.enabled or trainer.sanity_checking or not trainer.is_global_zero:
            return
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row |= self._metrics(trainer)
        new = [name for name in row if name not in self._columns]
        self._columns += sorted(new)
        self._rows.append(row)
        self._print(trainer, row, columns_changed=bool(new))

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        patterns = self.config.metric_patterns
        metrics = {
            name: torch.as_tensor(value)
            for name, value in trainer.callback_metrics.items()
            if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        scalars = {name: value for name, value in metrics.items() if value.numel() == 1}
        return dict(zip(scalars, fetch(list(scalars.values())), strict=True))

    def _print(self, trainer: Trainer, row: dict[str, float], *, columns_changed: bool) -> None:
        width = _terminal_width()
        blocks = lay_out(self._columns, row, width)
        with_header = columns_changed or self._until_header == 0 or len(blocks) > 1
        if with_header:
            self._until_header = _ROWS_PER_HEADER
        self._until_header -= 1
        text = _render(blocks, with_header=with_header, is_terminal=width is not None)
        bar = trainer.progress_bar_callback
        if bar is not None and getattr(bar, "is_enabled", True):  # a silenced bar prints nothing
            bar.print(text)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def _terminal_width() -> int | None:
    """Characters per line of the terminal; None where the output is none."""
    from rich.console import Console

    console = Console(force_jupyter=False)
    return console.width if console.is_terminal else None


def _render(blocks: Sequence[Block], *, with_header: bool, is_terminal: bool) -> str:
    lines: list[tuple[str, str]] = []
    for block in blocks:
        if with_header:
            lines.append((block.header, "bold"))
        lines.append((block.row, ""))
    if not is_terminal:
        return "\n".join(line for line, _ in lines)
    from rich.console import Console
    from rich.text import Text

    console = Console(force_jupyter=False)
    with console.capture() as capture:  # the progress bar prints it, so that it is not broken
        for line, style in lines:
            console.print(Text(line, style=style), soft_wrap=True)
    return capture.get().rstrip("\n")
