"""Logs how many epochs of training are done, as a fraction."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.step_metrics import is_logging_step, log_step_metrics
from nshtrainer_monitoring.epoch_length import EpochLength
from nshtrainer_monitoring.epoch_metrics import log_in_hook

from .config import LogEpochCallbackConfig
from .progress import epoch_fraction

__all__ = ["LogEpochCallback"]


class LogEpochCallback(ConfiguredCallback[LogEpochCallbackConfig]):
    """Logs the epoch; see `LogEpochCallbackConfig`.

    State: the last known value, for a test that follows, and the length of an epoch.
    """

    config_class = LogEpochCallbackConfig

    def __init__(self, config: LogEpochCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._known = 0.0
        self._length = EpochLength()
        if not self.config.train:
            silence_unused_hooks(self, "on_train_batch_end")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._known, "batches_per_epoch": self._length.learned}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._known = float(state_dict.get("epoch", 0.0))
        self._length = EpochLength(state_dict.get("batches_per_epoch"))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.config.train and stage == "fit":
            attach(trainer, self.state_key)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._length.start()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if is_logging_step(trainer):
            name = self.config.metric_name
            log_step_metrics(trainer, {name: self._now(trainer)}, totals=[name])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._now(trainer)
        if self._length.learn(trainer):
            self._known = trainer.current_epoch + 1.0  # also where the length is not known
        if self.config.train:
            log_in_hook(pl_module, {self.config.metric_name: self._known})

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.val and not trainer.sanity_checking:
            value = self._now(trainer) if trainer.state.fn == "fit" else self._known
            log_in_hook(pl_module, {self.config.metric_name: value})

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.test:
            log_in_hook(pl_module, {self.config.metric_name: self._known})

    def _now(self, trainer: Trainer) -> float:
        """The value inside of a training epoch."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current  # typed as its base
        batches = self._length.of(trainer)
        self._known = epoch_fraction(trainer.current_epoch, progress.processed, batches)
        return self._known
