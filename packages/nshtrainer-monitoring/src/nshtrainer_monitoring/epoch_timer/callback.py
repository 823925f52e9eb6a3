"""Measures how long epochs take, and what their steps consist of."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.step_metrics import is_logging_step, log_step_metrics
from nshtrainer_monitoring.epoch_length import EpochLength
from nshtrainer_monitoring.epoch_metrics import log_at_once, log_in_hook

from .clock import Clock
from .config import EpochTimerCallbackConfig
from .estimate import remaining_seconds
from .phases import PhaseClock
from .probe import StepProbe
from .samples import samples_in
from .text import describe_duration, describe_shares

__all__ = ["EpochTimerCallback"]

log = logging.getLogger(__name__)

_SHOWN: Final = frozenset({"train/samples_per_s", "train/eta_s"})
"""In a progress bar, which has batches per second itself."""
_NEWEST_COUNTS = 0.3  # of the pace, against all before: follows a change in a few logging steps


class EpochTimerCallback(ConfiguredCallback[EpochTimerCallbackConfig]):
    """Logs durations of epochs and of the parts of steps; see `EpochTimerCallbackConfig`.

    State: what the present training epoch has taken, the seconds of the last validation, and the
    length of an epoch.
    """

    config_class = EpochTimerCallbackConfig

    def __init__(self, config: EpochTimerCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        c = self.config
        self._measures_steps = c.log_step_times or c.log_throughput or c.log_eta
        self._train = Clock()
        self._other = Clock()  # validation, test and predict never overlap
        self._phases = PhaseClock()
        self._probe: StepProbe | None = None
        self._length = EpochLength()
        self._validation_s = 0.0
        self._epoch_batches = 0
        self._forget_interval()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "train_elapsed_s": self._train.elapsed,
            "train_phases_s": self._phases.total(),
            "train_batches": self._epoch_batches,
            "validation_s": self._validation_s,
            "batches_per_epoch": self._length.learned,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train.reset(float(state_dict.get("train_elapsed_s", 0.0)))
        self._phases.reset(state_dict.get("train_phases_s"))
        self._epoch_batches = int(state_dict.get("train_batches", 0))
        self._validation_s = float(state_dict.get("validation_s", 0.0))
        self._length = EpochLength(state_dict.get("batches_per_epoch"))

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what belongs to a running trainer."""
        return {**vars(self), "_probe": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._measures_steps:
            attach(trainer, self.state_key)

    # ---- training --------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that is resumed in the middle has no on_train_epoch_start.
        self._train.run()
        self._forget_interval()
        if not self._measures_steps:
            return
        log_step_metrics(trainer, {})  # the driver listens from the first batch on
        self._phases.settle = self._waiting_for(pl_module.device)
        self._probe = StepProbe(
            self._phases, self._on_batch_ended, split=self.config.log_step_times
        )
        self._probe.install(trainer)
        self._phases.enter("other")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._length.start()
        self._train.reset()
        self._train.run()
        self._phases.reset()
        self._epoch_batches = 0
        if self._measures_steps:
            self._phases.enter("other")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train.pause()
        self._phases.enter(None)
        self._length.learn(trainer)
        details: list[str] = []
        if self._measures_steps and self._epoch_batches:
            details.append(f"{self._epoch_batches / max(self._train.elapsed, 1e-9):.4g} batches/s")
        if self.config.log_step_times:
            details.append(describe_shares(self._phases.total()))
        self._report(trainer, "train", self._train.elapsed, details)
        log_in_hook(pl_module, {"train/epoch_time_s": self._train.elapsed})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_probe(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_probe(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._train.pause()  # kept for a checkpoint that is saved because of the exception
        self._remove_probe(trainer)

    def _on_batch_ended(self, trainer: Trainer, batch: Any) -> None:
        self._batches += 1
        self._epoch_batches += 1
        if self.config.log_throughput and self._samples is not None:
            samples = samples_in(batch)
            self._samples = None if samples is None else self._samples + samples
        if is_logging_step(trainer):
            measured = self._measured(trainer)
            shown = _SHOWN.intersection(measured) if self.config.prog_bar else ()
            log_step_metrics(trainer, measured, prog_bar=shown)

    def _measured(self, trainer: Trainer) -> dict[str, float]:
        """What the steps since the last logging step took, on average."""
        lap = self._phases.lap()
        seconds = max(sum(lap.values()), 1e-9)
        batches, samples = self._batches, self._samples
        values: dict[str, float] = {}
        if self.config.log_step_times:
            values["train/batch_time_s"] = seconds / batches
            values |= {f"train/{phase}_time_s": part / batches for phase, part in lap.items()}
        if self.config.log_throughput:
            values["train/batches_per_s"] = batches / seconds
            if samples is not None:
                values["train/samples_per_s"] = samples * trainer.world_size / seconds
        self._learn_pace(seconds / batches)
        if self.config.log_eta:
            eta = self._eta(trainer)
            if math.isfinite(eta):
                values["train/eta_s"] = eta
        self._batches, self._samples = 0, 0
        return values

    def _learn_pace(self, batch_s: float) -> None:
        before = batch_s if self._pace is None else self._pace
        self._pace = before + _NEWEST_COUNTS * (batch_s - before)

    def _eta(self, trainer: Trainer) -> float:
        if self._pace is None:
            return math.inf
        return remaining_seconds(trainer, self._length.of(trainer), self._pace, self._validation_s)

    def _forget_interval(self) -> None:
        self._batches = 0
        self._samples: int | None = 0
        self._pace: float | None = None
        self._phases.lap()

    def _remove_probe(self, trainer: Trainer) -> None:
        self._phases.enter(None)
        if self._probe is not None:
            self._probe.remove(trainer)
            self._probe = None
            self._phases.settle = None

    def _waiting_for(self, device: torch.device) -> Callable[[], object] | None:
        """What waits for *device*; None if that is not wanted, or it computes at once."""
        if not self.config.synchronize_device or device.type == "cpu":
            return None
        return getattr(torch, device.type).synchronize

    # ---- other stages ----------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._train.pause()
            self._phases.enter(None)
            self._start_other()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._finish_other(trainer, pl_module, "val")
            self._validation_s = self._other.elapsed

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._train.run()
            if self._probe is not None:
                self._phases.enter("callbacks" if self.config.log_step_times else "other")

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

    def _start_other(self) -> None:
        self._other.reset()
        self._other.run()

    def _finish_other(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._other.pause()
        self._report(trainer, stage, self._other.elapsed)
        log_in_hook(pl_module, {f"{stage}/epoch_time_s": self._other.elapsed})

    def _report(
        self, trainer: Trainer, stage: str, seconds: float, details: list[str] | None = None
    ) -> None:
        if not trainer.is_global_zero:
            return
        parts = [part for part in details or [] if part]
        if trainer.state.fn == "fit" and self.config.log_eta:
            eta = self._eta(trainer)
            parts += [f"{describe_duration(eta)} left"] if 0 < eta < math.inf else []
        log.info(
            "%s epoch %d took %s%s",
            stage,
            trainer.current_epoch,
            describe_duration(seconds),
            "".join(f"; {part}" for part in parts),
        )
