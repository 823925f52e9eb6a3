"""Configuration of the printed table of metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.metric import MetricConfig
from nshtrainer.types import MetricName, PositiveInt

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["PrintTableMetricsCallbackConfig"]


def _list_of_one(value: Any) -> Any:
    """A single pattern or metric may stand without its list."""
    return [value] if isinstance(value, (str, MetricConfig)) else value


@callback_registry.register
class PrintTableMetricsCallbackConfig(CallbackConfigBase):
    """Prints a row of metrics after each validation, on rank zero.

    A column stands for one metric name for the whole run; one that appears later is added on the
    right. A value that is better than all before it has a `*`, where it is known whether lower or
    higher is better: from `metrics`, from the run's `primary_metric`, or since a checkpoint, early
    stopping or `ReduceLROnPlateau` monitors the metric. A terminal shows it in color, a notebook
    as one table that grows; anything else is plain text.
    """

    name: Literal["print_table_metrics"] = "print_table_metrics"

    enabled: bool = True
    """False: no callback."""

    metric_patterns: Annotated[list[MetricName] | None, BeforeValidator(_list_of_one)] = None
    """Shell patterns (`val/*`, `*loss`), case-sensitive: metrics that fit none are left out. None:
    all are shown."""

    metrics: Annotated[list[MetricConfig], BeforeValidator(_list_of_one)] = Field(
        default_factory=list[MetricConfig]
    )
    """In which direction metrics get better, where nothing else says so, or something else says
    otherwise."""

    show_change: bool = True
    """Also show how much each metric has changed since the row before."""

    max_rows: PositiveInt = 100
    """How many rows are kept, for resuming and for notebooks; the best values are kept longer."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled:
            from .callback import PrintTableMetricsCallback

            yield PrintTableMetricsCallback(self, primary_metric=trainer_config.primary_metric)
