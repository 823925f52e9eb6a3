"""Configuration of metric validation: which metrics have to be logged, and what they may be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.metric import MetricConfig
from nshtrainer.types import MetricName, Real

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["MetricValidationCallbackConfig"]


def _list_of_one(value: Any) -> Any:
    """A single metric may stand without its list."""
    return [value] if isinstance(value, (str, MetricConfig)) else value


def _not_empty(value: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    low, high = value
    if low is None and high is None:
        raise PydanticCustomError("range", "a range without bounds checks nothing; give one")
    if low is not None and high is not None and low > high:
        raise PydanticCustomError(
            "range",
            "a range goes from its lower bound to its upper one, not from {low} to {high}",
            {"low": low, "high": high},
        )
    return value


_Range = Annotated[tuple[Real | None, Real | None], AfterValidator(_not_empty)]


@callback_registry.register
class MetricValidationCallbackConfig(CallbackConfigBase):
    """Checks that what something waits for is logged, before a training is wasted on a typo.

    Looks at `trainer.callback_metrics`, where early stopping and checkpoints look too. Metrics
    named as validation metrics (`val...`, `valid...`) are looked for after the sanity check and
    after the first validation; others may come from training, and are looked for once a training
    epoch and a validation are complete. What early stopping, checkpoint callbacks and
    `ReduceLROnPlateau` monitor is included. Without validation nothing is checked.
    """

    name: Literal["metric_validation"] = "metric_validation"

    metrics: Annotated[list[MetricConfig | MetricName], BeforeValidator(_list_of_one)] = Field(
        default_factory=list["MetricConfig | str"]
    )
    """Metrics that have to be logged, by name or as configurations."""

    error_behavior: Literal["raise", "warn"] = "raise"
    """Whether what is found stops the run, on every rank, or is a warning, once per metric."""

    validate_default_metric: bool = True
    """Also look for the run's `primary_metric`."""

    check_finite: bool = False
    """After each validation, the sanity check included, see that no required metric is NaN or
    infinite."""

    ranges: dict[MetricName, _Range] = Field(default_factory=dict[str, Any])
    """Smallest and largest value that each of these metrics may have, `[0, 1]` for an accuracy,
    null for no bound; looked at when `check_finite` looks. These metrics are required too."""

    check_ranks_agree: bool = False
    """When `check_finite` looks, see that every rank has the same value of each required metric. One
    that was logged without `sync_dist=True` has not, and lets ranks disagree on what is best."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import MetricValidationCallback

        primary = trainer_config.primary_metric if self.validate_default_metric else None
        yield MetricValidationCallback(self, primary_metric=primary)
