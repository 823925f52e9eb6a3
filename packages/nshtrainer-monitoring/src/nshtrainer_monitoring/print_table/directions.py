"""In which direction the metrics of a run get better."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from nshtrainer.metric import MetricConfig

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["directions_of"]


def directions_of(trainer: Trainer, known: Iterable[MetricConfig]) -> dict[str, MetricConfig]:
    """Return what is known of each metric: the first that says something counts.

    Args:
        trainer: Its callbacks are asked for what they monitor and for metrics in their
            configurations, its `ReduceLROnPlateau` schedulers for what they monitor.
        known: Metrics that are given.
    """
    found: dict[str, MetricConfig] = {}
    for metric in (*known, *_asked(trainer)):
        found.setdefault(metric.name, metric)
    return found


def _asked(trainer: Trainer) -> Iterator[MetricConfig]:
    lightning: Any = trainer  # `callbacks` is set by a connector, unknown to type checkers
    callbacks: list[Any] = lightning.callbacks
    for callback in callbacks:
        yield from _monitored(getattr(callback, "monitor", None), getattr(callback, "mode", None))
    for scheduler in trainer.lr_scheduler_configs:
        if scheduler.reduce_on_plateau:
            yield from _monitored(scheduler.monitor, getattr(scheduler.scheduler, "mode", None))
    for callback in callbacks:
        yield from _configured(getattr(callback, "config", None))


def _monitored(name: object, mode: object) -> Iterator[MetricConfig]:
    if isinstance(name, str) and name and mode in ("min", "max"):
        yield MetricConfig(name=name, mode=mode)


def _configured(config: object) -> Iterator[MetricConfig]:
    values: Iterable[object] = vars(config).values() if hasattr(config, "__dict__") else ()
    for value in values:
        for item in cast("list[object]", value) if isinstance(value, list) else [value]:
            if isinstance(item, MetricConfig):
                yield item
