"""Configuration of metric validation: which metrics have to be logged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.metric import MetricConfig
from nshtrainer.types import MetricName

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["MetricValidationCallbackConfig"]


def _list_of_one(value: Any) -> Any:
    """A single metric may stand without its list."""
    return [value] if isinstance(value, (str, MetricConfig)) else value


@callback_registry.register
class MetricValidationCallbackConfig(CallbackConfigBase):
    """Checks that what something waits for is logged, before a training is wasted on a typo.

    Looks at `trainer.callback_metrics`, where early stopping and checkpoints look too. Metrics
    named as validation metrics (`val...`, `valid...`) are looked for after the sanity check and
    after the first validation; others may come from training, and are looked for once a training
    epoch and a validation are complete. What early stopping and checkpoint callbacks monitor is
    included. Without validation nothing is checked.
    """

    name: Literal["metric_validation"] = "metric_validation"

    metrics: Annotated[list[MetricConfig | MetricName], BeforeValidator(_list_of_one)] = Field(
        default_factory=list["MetricConfig | str"]
    )
    """Metrics that have to be logged, by name or as configurations."""

    error_behavior: Literal["raise", "warn"] = "raise"
    """Whether a missing metric stops the run or is a warning, once per metric."""

    validate_default_metric: bool = True
    """Also look for the run's `primary_metric`."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import MetricValidationCallback

        primary = trainer_config.primary_metric if self.validate_default_metric else None
        yield MetricValidationCallback(self, primary_metric=primary)
