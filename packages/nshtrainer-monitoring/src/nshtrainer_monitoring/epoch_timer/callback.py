"""Measures how long epochs take."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer_monitoring.epoch_metrics import log_at_once, log_in_hook

from .clock import Clock
from .config import EpochTimerCallbackConfig

__all__ = ["EpochTimerCallback"]

log = logging.getLogger(__name__)


class EpochTimerCallback(ConfiguredCallback[EpochTimerCallbackConfig]):
    """Logs `{stage}/epoch_time_s`; see `EpochTimerCallbackConfig`.

    State: the seconds that the present training epoch has taken.
    """

    config_class = EpochTimerCallbackConfig

    def __init__(self, config: EpochTimerCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._train = Clock()
        self._other = Clock()  # validation, test and predict never overlap

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"train_elapsed_s": self._train.elapsed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train.reset(float(state_dict.get("train_elapsed_s", 0.0)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that is resumed in the middle has no on_train_epoch_start.
        self._train.run()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.reset()
        self._train.run()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.pause()
        self._report(trainer, "train", self._train.elapsed)
        log_in_hook(pl_module, {"train/epoch_time_s": self._train.elapsed})

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._train.pause()
            self._start_other()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._finish_other(trainer, pl_module, "val")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._train.run()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_other()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_other(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_other()

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._other.pause()
        self._report(trainer, "predict", self._other.elapsed)
        # Lightning takes no metrics from hooks while it predicts; those of rank zero are logged.
        log_at_once(trainer, {"predict/epoch_time_s": self._other.elapsed})

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._train.pause()  # kept for a checkpoint that is saved because of the exception

    def _start_other(self) -> None:
        self._other.reset()
        self._other.run()

    def _finish_other(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._other.pause()
        self._report(trainer, stage, self._other.elapsed)
        log_in_hook(pl_module, {f"{stage}/epoch_time_s": self._other.elapsed})

    @staticmethod
    def _report(trainer: Trainer, stage: str, seconds: float) -> None:
        if trainer.is_global_zero:
            log.info("%s epoch %d took %.2f s", stage, trainer.current_epoch, seconds)
