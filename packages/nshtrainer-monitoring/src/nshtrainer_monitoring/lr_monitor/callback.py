"""Logs learning rates."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.step_metrics import is_logging_step, log_step_metrics
from nshtrainer_monitoring.epoch_metrics import log_at_once

from .config import LearningRateMonitorConfig
from .readings import name_sources, read

__all__ = ["LearningRateMonitorCallback"]


class LearningRateMonitorCallback(ConfiguredCallback[LearningRateMonitorConfig]):
    """Logs learning rates before the batch or epoch that uses them.

    See `LearningRateMonitorConfig`.
    """

    config_class = LearningRateMonitorConfig

    def __init__(self, config: LearningRateMonitorConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.logging_interval == "epoch":
            silence_unused_hooks(self, "on_train_batch_start")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.config.logging_interval != "epoch":
            attach(trainer, self.state_key)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if is_logging_step(trainer):
            values = self._read(trainer, ("step", None))
            log_step_metrics(trainer, values, totals=values)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.logging_interval != "step":
            log_at_once(trainer, self._read(trainer, ("epoch", None)))

    def _read(self, trainer: Trainer, intervals: Container[str | None]) -> dict[str, float]:
        automatic = trainer.lightning_module.automatic_optimization
        schedulers = [
            (c.scheduler.optimizer, c.name, c.interval if automatic else None)
            for c in trainer.lr_scheduler_configs
        ]
        values: dict[str, float] = {}
        for source in name_sources(schedulers, trainer.optimizers):
            if self.config.logging_interval is not None or source.interval in intervals:
                values |= read(
                    source,
                    momentum=self.config.log_momentum,
                    weight_decay=self.config.log_weight_decay,
                )
        return {f"{self.config.prefix}{name}": value for name, value in values.items()}
