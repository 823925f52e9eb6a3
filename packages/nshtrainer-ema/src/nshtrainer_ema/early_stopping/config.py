"""Configuration of early stopping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.errors import ConfigError
from nshtrainer.metric import MetricConfig
from nshtrainer.types import NonNegativeFloat, NonNegativeInt, Real

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["EarlyStoppingCallbackConfig", "PatienceUnit"]

PatienceUnit = Literal["checks", "steps", "seconds", "minutes", "hours"]


@callback_registry.register
class EarlyStoppingCallbackConfig(CallbackConfigBase):
    """Ends the training when a metric has stopped getting better.

    It is checked after each validation that logs it, else at the end of each training epoch.
    """

    name: Literal["early_stopping"] = "early_stopping"

    metric: MetricConfig | None = None
    """What to wait for; None is the run's `primary_metric`."""

    patience: NonNegativeInt
    """For how long the metric may fail to get better before training ends, in `patience_unit`; looked
    at when the metric is checked. 0 ends it at the first check without a better value."""

    patience_unit: PatienceUnit = "checks"
    """What patience counts: checks in a row, optimizer steps (`trainer.global_step`), or time spent
    training, validation included, by rank 0's monotonic clock. Resumed runs add up; the time between
    them does not count."""

    min_delta: NonNegativeFloat = 1.0e-8
    """By more than this a value must beat the best one to count as better."""

    min_delta_mode: Literal["absolute", "relative"] = "absolute"
    """Whether `min_delta` is in the metric's own unit, or a fraction of the size of the best value:
    0.01 is one percent of it, for negative values too. Of a best value of 0 that is 0."""

    min_lr: NonNegativeFloat | None = None
    """End the training when the learning rate, having been above this, has come down to it or
    below; with several rates, the largest counts. None never does."""

    skip_first_n_epochs: NonNegativeInt = 0
    """In the first so many epochs nothing is checked."""

    strict: bool = True
    """Raise an error when the metric was not logged; False warns and goes on."""

    check_finite: bool = True
    """End the training when the metric is NaN or infinite."""

    stopping_threshold: Real | None = None
    """End the training once the metric is better than this."""

    divergence_threshold: Real | None = None
    """End the training once the metric is worse than this."""

    restore_best_weights: bool = False
    """When this ends training, load the weights of the best checkpoint into the module. Needs a
    checkpoint callback that keeps the best by the same metric; with EMA, what was evaluated is loaded."""

    log_metrics: bool = True
    """Send `early_stopping/wait_count`, `early_stopping/best` and, when training is ended,
    `early_stopping/stopping_reason` to the loggers at each check."""

    def metric_of(self, trainer_config: TrainerConfig) -> MetricConfig:
        """The metric to wait for in a run.

        Raises:
            nshtrainer.errors.ConfigError: There is none.
        """
        metric = self.metric or trainer_config.primary_metric
        if metric is None:
            raise ConfigError(
                "early_stopping has nothing to wait for: neither its `metric` nor the run's "
                "`primary_metric` is set; set one, for example "
                "`primary_metric=MetricConfig(name='val/loss', mode='min')`"
            )
        return metric

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import EarlyStoppingCallback

        yield EarlyStoppingCallback(self.replace(metric=self.metric_of(trainer_config)))
