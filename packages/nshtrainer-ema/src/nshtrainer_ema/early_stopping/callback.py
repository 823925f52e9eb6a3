"""Early stopping, on top of Lightning's: says why, survives resuming, and the ranks agree."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nshtrainer.callbacks.callback import resolve_config, silence_unused_hooks
from nshtrainer.errors import ConfigError, NshTrainerError

from .config import EarlyStoppingCallbackConfig
from .learning_rate import LearningRateFloor, largest_learning_rate

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
    `stopping_reason` and `stopping_reason_message` say why training ended; the message is shown.
    For `min_lr`, the reason is `STOPPING_THRESHOLD`.

    Args:
        config: The configuration, with its metric set.
        options: Its fields, if no configuration is given.

    Raises:
        nshtrainer.errors.ConfigError: The metric is not set.
    """

    config_class: ClassVar[type[EarlyStoppingCallbackConfig]] = EarlyStoppingCallbackConfig

    config: EarlyStoppingCallbackConfig
    """The configuration; not shared with any other run."""

    def __init__(self, config: EarlyStoppingCallbackConfig | None = None, **options: Any) -> None:
        self.config = resolve_config(EarlyStoppingCallbackConfig, config, options)
        if self.config.metric is None:
            raise ConfigError(
                "early stopping without a metric has nothing to wait for; give one, for example "
                "`metric=MetricConfig(name='val/loss', mode='min')`"
            )
        super().__init__(
            monitor=self.config.metric.name,
            mode=self.config.metric.mode,
            min_delta=self.config.min_delta,
            patience=self.config.patience,
            strict=self.config.strict,
            check_finite=self.config.check_finite,
            stopping_threshold=self.config.stopping_threshold,
            divergence_threshold=self.config.divergence_threshold,
            check_on_train_epoch_end=False,  # decided here, from where the metric is logged
        )
        self._floor = None if self.config.min_lr is None else LearningRateFloor(self.config.min_lr)
        self._is_new()
        silence_unused_hooks(self)

    def _is_new(self) -> None:
        self._logged_by_validation = False
        self._validated = False
        self._warned = False

    @property
    @override
    def state_key(self) -> str:
        """`nshtrainer.<name>` or `nshtrainer.<name>#<label>`: survives another metric."""
        return f"nshtrainer.{self.config.identity}"

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["monitor"] = self.monitor
        state["best_score"] = float(self.best_score)
        state["lr_was_above_min"] = self._floor is not None and self._floor.was_above
        # Of a save between a validation and its epoch's end: that epoch has been counted already.
        state["logged_by_validation"] = self._logged_by_validation
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; what the configuration says wins over what the file says."""
        if self._floor is not None:
            self._floor.was_above = bool(state_dict.get("lr_was_above_min", False))
        if (waited_for := state_dict.get("monitor", self.monitor)) != self.monitor:
            log.warning(
                "early stopping waited for %r when this checkpoint was saved and now waits for %r: "
                "it starts counting anew",
                waited_for,
                self.monitor,
            )
            return
        self._logged_by_validation = bool(state_dict.get("logged_by_validation", False))
        best = self.best_score.new_tensor(float(state_dict["best_score"]))
        super().load_state_dict({**state_dict, "best_score": best, "patience": self.patience})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._is_new()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        no_rate = largest_learning_rate(trainer.optimizers) is None
        if self._floor is not None and no_rate and trainer.is_global_zero:
            log.warning(
                "early stopping's min_lr=%s is ignored: no optimizer has a learning rate",
                self.config.min_lr,
            )

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

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._should_skip_check(trainer) or self._logged_by_validation:
            return
        if _on_any_rank(trainer, self.monitor in trainer.callback_metrics):
            self._run_early_stopping_check(trainer)
        elif self._validated or not trainer.enable_validation:
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
        current = trainer.callback_metrics.get(self.monitor)
        reason = None
        should_stop = False
        if current is not None:
            should_stop, reason = self._evaluate_stopping_criteria(current.squeeze())
        if not should_stop and self._floor is not None:
            rate = largest_learning_rate(trainer.optimizers)
            if should_stop := self._floor.is_reached(rate):
                self.stopping_reason = EarlyStoppingReason.STOPPING_THRESHOLD
                reason = (
                    f"The learning rate has come down to {rate:.3g}, and min_lr is "
                    f"{self._floor.floor:.3g}. Signaling Trainer to stop."
                )
        if not _on_any_rank(trainer, should_stop):
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason_message = None
            return
        trainer.should_stop = True
        self.stopped_epoch = trainer.current_epoch
        self.stopping_reason_message = (
            reason if should_stop and reason else "Another rank signals to stop."
        )
        # Through Lightning's logger, which shows it where no logging was set up.
        rank_zero_info(f"Early stopping: {self.stopping_reason_message}")

    @override
    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        stop, reason = super()._evaluate_stopping_criteria(current)
        # A tensor of the training device would bring that device into the checkpoint.
        self.best_score = self.best_score.detach().cpu()
        return stop, reason

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
