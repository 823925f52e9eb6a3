"""Early stopping, on top of Lightning's: says why, survives resuming, and the ranks agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nshtrainer.callbacks.callback import resolve_config, silence_unused_hooks
from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.runtime.step_metrics import batches_that_stepped

from .config import EarlyStoppingCallbackConfig
from .learning_rate import LearningRateFloor, largest_learning_rate
from .patience import Moment, TrainingClock, Wait, improves
from .restoring import RestoreAtEnd, best_checkpoint_callback, restore

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

__all__ = ["EarlyStoppingCallback", "MissingMetricError"]

log = logging.getLogger(__name__)


class MissingMetricError(NshTrainerError, RuntimeError):
    """A metric that early stopping waits for was not logged."""


class EarlyStoppingCallback(
    EarlyStopping
):  # Lightning calls its own class after the module's hooks
    """Ends the training when a metric has stopped getting better.

    A metric that validation logs is checked right after each validation, before checkpoints are
    saved, so that a run resumed from one continues with the counts of that moment; any other is
    checked at the end of each training epoch. Never in the sanity check or a `fast_dev_run`.

    `stopping_reason`, `stopping_reason_message` and `stopped_epoch` say why and when training was
    ended; the message is shown, and all three are in checkpoints, with what a rank that decided
    told. For `min_lr`, the reason is `STOPPING_THRESHOLD`. `wait_count` counts checks, whatever
    the unit of patience.

    Each check is a collective: one small reduction, and a broadcast if patience is a time.

    Args:
        config: The configuration, with its metric set.
        options: Its fields, if no configuration is given.

    Raises:
        nshtrainer.errors.ConfigError: The metric is not set.
    """

    config_class: ClassVar[type[EarlyStoppingCallbackConfig]] = EarlyStoppingCallbackConfig

    config: EarlyStoppingCallbackConfig
    """The configuration; not shared with any other run."""

    restored_path: str | None
    """The checkpoint whose weights the module got at the end of the last fit; None for none."""

    def __init__(self, config: EarlyStoppingCallbackConfig | None = None, **options: Any) -> None:
        self.config = resolve_config(EarlyStoppingCallbackConfig, config, options)
        if self.config.metric is None:
            raise ConfigError(
                "early stopping without a metric has nothing to wait for; give one, for example "
                "`metric=MetricConfig(name='val/loss', mode='min')`"
            )
        self._metric = self.config.metric
        super().__init__(
            monitor=self._metric.name,
            mode=self._metric.mode,
            min_delta=self.config.min_delta,
            patience=self.config.patience,
            strict=self.config.strict,
            check_finite=self.config.check_finite,
            stopping_threshold=self.config.stopping_threshold,
            divergence_threshold=self.config.divergence_threshold,
            check_on_train_epoch_end=False,  # decided here, from where the metric is logged
        )
        self._floor = None if self.config.min_lr is None else LearningRateFloor(self.config.min_lr)
        self._wait, self._clock = Wait(self.config.patience_unit), TrainingClock()
        self._now = Moment(0, 0.0)
        self._is_new()
        silence_unused_hooks(self)

    def _is_new(self) -> None:
        self._logged_by_validation = False
        self._validated = False
        self._seen: Tensor | None = None
        self._warned = False
        self._has_stopped = False
        self.stopped_epoch = 0
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
        self.restored_path = None

    @property
    @override
    def state_key(self) -> str:
        """`nshtrainer.<name>` or `nshtrainer.<name>#<label>`: survives another metric."""
        return f"nshtrainer.{self.config.identity}"

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["monitor"], state["mode"] = self.monitor, self.mode
        state["best_score"] = float(self.best_score)
        state["lr_was_above_min"] = self._floor is not None and self._floor.was_above
        # Of a save between a validation and its epoch's end: that epoch has been counted already.
        state["logged_by_validation"] = self._logged_by_validation
        state.update(self._wait.state_dict())
        if self._wait.is_timed:
            state["seconds"] = self._clock.seconds
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; what the configuration says wins over what the file says."""
        if self._floor is not None:
            self._floor.was_above = bool(state_dict.get("lr_was_above_min", False))
        self._clock.reset(float(state_dict.get("seconds", 0.0)))
        mine = (self.monitor, self.mode)
        waited_for = (state_dict.get("monitor", mine[0]), state_dict.get("mode", mine[1]))
        if waited_for != mine:
            log.warning(
                "early stopping waited for %r (%s) when this checkpoint was saved and now waits for "
                "%r (%s): it starts counting anew",
                *waited_for,
                *mine,
            )
            return
        self._logged_by_validation = bool(state_dict.get("logged_by_validation", False))
        best = torch.tensor(float(state_dict["best_score"]), dtype=torch.float64)
        super().load_state_dict({**state_dict, "best_score": best, "patience": self.patience})
        self._wait.load_state_dict(state_dict, self._clock.seconds)
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            rank_zero_info(
                f"Early stopping had ended this training in epoch {self.stopped_epoch}: "
                f"{self.stopping_reason_message} It goes on with a patience of {self.patience} "
                f"{self._wait.unit}."
            )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a fit.

        Raises:
            nshtrainer.errors.ConfigError: `restore_best_weights` is on, and no checkpoint callback
                keeps the best by this metric, or the strategy cannot load it.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._is_new()
        if self.config.restore_best_weights and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set by Lightning's connector
            best_checkpoint_callback(trainer, self.monitor, self.mode)
            RestoreAtEnd(self._restore).attach(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.run()
        no_rate = largest_learning_rate(trainer.optimizers) is None
        if self._floor is not None and no_rate and trainer.is_global_zero:
            log.warning(
                "early stopping's min_lr=%s is ignored: no optimizer has a learning rate",
                self.config.min_lr,
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._clock.pause()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._floor is not None:
            self._floor.is_reached(largest_learning_rate(trainer.optimizers))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._should_skip_check(trainer):
            return
        self._validated = True
        # A rank may not have logged it (`rank_zero_only`); all must go the same way from here.
        self._logged_by_validation = _on_any_rank(trainer, self.monitor in _just_logged(trainer))
        if self._logged_by_validation:
            self._run_early_stopping_check(trainer)
            self._seen = trainer.callback_metrics.get(self.monitor)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning keeps the values of earlier epochs, as the same objects.
        known, before = trainer.callback_metrics.get(self.monitor), self._seen
        self._seen = known
        if self._should_skip_check(trainer) or self._logged_by_validation:
            return
        if _on_any_rank(trainer, known is not None and known is not before):
            self._run_early_stopping_check(trainer)
        elif not _on_any_rank(trainer, known is not None) and (
            self._validated or not trainer.enable_validation
        ):
            # Else wait: there may be no validation in this epoch, or, in a run that is resumed from
            # a save at its end, none is left; what it and the epoch logged is not in the file.
            self._report_missing(trainer)

    @override
    def _should_skip_check(self, trainer: Trainer) -> bool:
        return (
            super()._should_skip_check(trainer)
            or bool(trainer.fast_dev_run)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType] -- set by Lightning's connector
            or trainer.current_epoch < self.config.skip_first_n_epochs
        )

    @override
    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        self._now = self._moment(trainer)
        current = trainer.callback_metrics.get(self.monitor)
        reason, message = EarlyStoppingReason.NOT_STOPPED, None
        if current is not None:
            reason, message = self._judge(current.squeeze().detach().cpu())
        if message is None and self._floor is not None:
            rate = largest_learning_rate(trainer.optimizers)
            if self._floor.is_reached(rate):
                reason = EarlyStoppingReason.STOPPING_THRESHOLD
                message = f"The learning rate is {rate:.3g}, and min_lr is {self._floor.floor:.3g}."
        if _on_any_rank(trainer, message is not None):
            self._stop(trainer, reason, message)
        elif not self._has_stopped:  # else `min_epochs` or `min_steps` have it go on for a while
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason_message = None
        if self.config.log_metrics:
            self._log_metrics(trainer)

    def _moment(self, trainer: Trainer) -> Moment:
        seconds = self._clock.seconds
        if self._wait.is_timed:
            seconds = trainer.strategy.broadcast(seconds)  # the ranks' clocks may disagree
        return Moment(trainer.global_step, seconds)

    @override
    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Say, in Lightning's form, whether *current* ends the training."""
        self.stopping_reason, message = self._judge(current.detach().cpu())
        return message is not None, message

    def _judge(self, current: Tensor) -> tuple[EarlyStoppingReason, str | None]:
        """Count a value of the metric, 0-dim on the host; return why it ends the training, if it does.

        `best_score` stays on the host too, else the training device would be in checkpoints.
        """
        if self.check_finite and not bool(torch.isfinite(current)):
            return EarlyStoppingReason.NON_FINITE_METRIC, (
                f"{self.monitor} is {float(current):g}, which is not finite. "
                f"Best value: {float(self.best_score):.6g}."
            )
        is_better = improves(
            current,
            self.best_score,
            mode=self._metric.mode,
            min_delta=self.config.min_delta,
            relative=self.config.min_delta_mode == "relative",
        )
        if is_better:
            self.best_score = current
        self.wait_count = 0 if is_better else self.wait_count + 1
        self._wait.observe(self._now, self.wait_count)
        return self._past_a_threshold(current) or self._out_of_patience()

    def _past_a_threshold(self, current: Tensor) -> tuple[EarlyStoppingReason, str] | None:
        better, worse = self.stopping_threshold, self.divergence_threshold
        beats = cast("Callable[[Tensor, float], Tensor]", self.monitor_op)
        if better is not None and beats(current, better):
            return EarlyStoppingReason.STOPPING_THRESHOLD, (
                f"{self.monitor} is {float(current):.6g}, better than the stopping threshold "
                f"{better:g}."
            )
        if worse is not None and beats(-current, -worse):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, (
                f"{self.monitor} is {float(current):.6g}, worse than the divergence threshold "
                f"{worse:g}."
            )
        return None

    def _out_of_patience(self) -> tuple[EarlyStoppingReason, str | None]:
        if self.wait_count == 0 or self._wait.waited < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, None
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, (
            f"{self.monitor} did not improve in the last {self._wait}. "
            f"Best value: {float(self.best_score):.6g}."
        )

    def _stop(self, trainer: Trainer, reason: EarlyStoppingReason, message: str | None) -> None:
        """End the training, on every rank, with the words of the first rank that wants to."""
        rank = _first_rank(trainer, wants=message is not None)
        value, told = trainer.strategy.broadcast((reason.value, message), src=rank)
        if message is None:
            message = "Another rank signals to stop."
            if trainer.is_global_zero:  # whose words are shown and stored
                message = f"Rank {rank} signals to stop: {told}"
        self.stopping_reason = EarlyStoppingReason(value)
        self.stopping_reason_message = message
        trainer.should_stop = self._has_stopped = True
        self.stopped_epoch = trainer.current_epoch
        # Through Lightning's logger, which shows it where no logging was set up.
        rank_zero_info(f"Early stopping: {message}")

    def _log_metrics(self, trainer: Trainer) -> None:
        """Send the count and the best value to the loggers, beside what the metric's stage logs."""
        if not (trainer.loggers and trainer.is_global_zero):
            return
        prefix = "/".join(filter(None, ("early_stopping", self.config.label)))
        values = {"wait_count": float(self.wait_count), "best": float(self.best_score)}
        if self._wait.unit != "checks":
            values[f"waited_{self._wait.unit}"] = float(self._wait.waited)
        if self._has_stopped:
            values["stopping_reason"] = float(self.stopping_reason.value)
        metrics = {f"{prefix}/{k}": v for k, v in values.items() if math.isfinite(v)}
        # Lightning's own x-axis, which it has moved on by one at the end of an epoch.
        step = max(batches_that_stepped(trainer) - (0 if trainer.validating else 1), 0)
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": float(trainer.current_epoch)}, step=step)

    def _restore(self, trainer: Trainer) -> bool:
        """Load the best weights if this has ended the training, and no other has loaded its own."""
        if not self._has_stopped:
            return False
        others: list[Any] = [c for c in trainer.callbacks if isinstance(c, EarlyStoppingCallback)]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- set by Lightning's connector
        if any(other.restored_path is not None for other in others):
            return False
        callback = best_checkpoint_callback(trainer, self.monitor, self.mode)
        self.restored_path = restore(trainer, callback)
        return self.restored_path is not None

    def _report_missing(self, trainer: Trainer) -> None:
        logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        message = (
            f"early stopping waits for the metric {self.monitor!r}, which was not logged in epoch "
            f"{trainer.current_epoch}; logged: {logged}. Log it with self.log({self.monitor!r}, "
            "...), or name another one in `early_stopping.metric`."
        )
        if self.strict:
            raise MissingMetricError(message)
        if not self._warned and trainer.is_global_zero:
            self._warned = True
            log.warning("%s", message)


def _just_logged(trainer: Trainer) -> set[str]:
    """The names that the validation that is ending has logged for callbacks.

    `trainer.callback_metrics` also has those of training, from the last epoch.
    """
    results = trainer._results  # pyright: ignore[reportPrivateUsage] -- no public way to the metrics of one loop
    return set() if results is None else set(results.metrics(on_step=False)["callback"])


def _on_any_rank(trainer: Trainer, decision: bool) -> bool:
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def _first_rank(trainer: Trainer, *, wants: bool) -> int:
    """The first rank that wants to; at least one does."""
    if trainer.world_size == 1:
        return 0
    mine = trainer.global_rank if wants else trainer.world_size
    strategy: Any = trainer.strategy
    rank = strategy.reduce(torch.tensor(mine, device=strategy.root_device), reduce_op="min")
    return int(rank)
