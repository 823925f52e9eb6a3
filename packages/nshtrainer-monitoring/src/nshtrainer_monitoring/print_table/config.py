"""Configuration of the printed table of metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import MetricName

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["PrintTableMetricsCallbackConfig"]


def _list_of_one(value: Any) -> Any:
    """A single pattern may stand without its list."""
    return [value] if isinstance(value, str) else value


@callback_registry.register
class PrintTableMetricsCallbackConfig(CallbackConfigBase):
    """Prints a row of metrics after each validation, on rank zero.

    A column stands for one metric name for the whole run; one that appears later is added on the
    right. In a terminal the header is highlighted; otherwise the table is plain text.
    """

    name: Literal["print_table_metrics"] = "print_table_metrics"

    enabled: bool = True
    """False: no callback."""

    metric_patterns: Annotated[list[MetricName] | None, BeforeValidator(_list_of_one)] = None
    """Shell patterns (`val/*`, `*loss`), case-sensitive: metrics that fit none are left out. None:
    all are shown."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled:
            from .callback import PrintTableMetricsCallback

            yield PrintTableMetricsCallback(self)
