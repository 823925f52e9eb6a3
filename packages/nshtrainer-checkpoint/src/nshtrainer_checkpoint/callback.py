"""`BestCheckpointCallback` and `LastCheckpointCallback`: what to rank by, and when to save."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from nshtrainer.callbacks.callback import resolve_config, silence_unused_hooks
from nshtrainer.errors import ConfigError
from nshtrainer.spelling import nearest

from .base import CheckpointCallback
from .config import BestCheckpointCallbackConfig, LastCheckpointCallbackConfig
from .metadata import Record
from .names import Key, NameTemplate, slug
from .retention import best_first, newest_first
from .writer import Writer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from nshtrainer.run.run import Run

__all__ = ["BestCheckpointCallback", "LastCheckpointCallback"]


class BestCheckpointCallback(CheckpointCallback):
    """Keeps the checkpoints with the best values of a metric.

    Args:
        config: What to keep; by hand its `metric` must be set.
        run: The run; None keeps them below the trainer's root directory.
        folder_name: Name of the folder; None is `best_<metric>`.
        options: Fields of the configuration, if none is given.

    Raises:
        ConfigError: There is no metric.
        pydantic.ValidationError: An option does not fit.
    """

    config: BestCheckpointCallbackConfig
    """The configuration; not shared with any other run."""

    def __init__(
        self,
        config: BestCheckpointCallbackConfig | None = None,
        *,
        run: Run | None = None,
        folder_name: str | None = None,
        **options: Any,
    ) -> None:
        config = resolve_config(BestCheckpointCallbackConfig, config, options)
        if config.metric is None:
            raise ConfigError(
                "BestCheckpointCallback needs a metric and there is none; give "
                "metric=MetricConfig(name=..., mode='min' or 'max')"
            )
        metric = self._metric = config.metric
        name = folder_name or _labelled(f"best_{slug(metric.name)}", config.label)
        self.config = config
        super().__init__(
            config,
            Writer(
                identity=config.identity,
                folder_name=name,
                dirpath=config.dirpath,
                run=run,
                link_name=f"{name}.ckpt" if config.save_symlink else None,
                weights_only=config.save_weights_only,
            ),
            NameTemplate.parse(config.filename)
            if config.filename is not None
            else _default_template(f"-{slug(metric.name)}", metric.name),
            metric,
        )
        self._before: Any = None
        self._waits_for_epoch = False
        silence_unused_hooks(self, "on_train_batch_end")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._before, self._waits_for_epoch = None, False  # of an earlier fit

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = trainer.callback_metrics.get(self._metric.name)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_due(trainer):
            return
        # Lightning keeps the value of the epoch before until a training metric is reduced again,
        # which is after this. Rank 0 decides: the others may not have logged it at all.
        is_there = self._metric.name in self._logged(trainer)
        if trainer.strategy.broadcast(is_there):
            self._save(trainer, pl_module)
        else:
            self._waits_for_epoch = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits_for_epoch:
            self._waits_for_epoch = False
            self._save_if_due(trainer, pl_module)
        else:
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def _logged(self, trainer: Trainer) -> dict[str, Any]:
        """Without the metric, if nothing was logged for it since validation began."""
        logged = super()._logged(trainer)
        if self._before is not None and logged.get(self._metric.name) is self._before:
            del logged[self._metric.name]
        return logged

    @override
    def _value(self, metrics: dict[str, float]) -> float | None:
        value = metrics.get(self._metric.name)
        if value is None:
            near = nearest(self._metric.name, metrics)
            self._warn_once(
                "metric",
                f"the metric {self._metric.name!r} was not logged, so what is best is not known and "
                f"every number would rank before this checkpoint. Logged: "
                f"{', '.join(sorted(metrics)) or 'nothing'}. "
                + (f"Did you mean {near!r}?" if near else "Log it in `validation_step`."),
            )
        return value

    @override
    def _competitors(self) -> list[Record]:
        return [*self._inherited(), *self.writer.on_the_way()]

    @override
    def _rank(self, records: list[Record]) -> list[Record]:
        return best_first(records, self._metric.mode)


class LastCheckpointCallback(CheckpointCallback):
    """Keeps the newest checkpoints.

    Args:
        config: What to keep and when to save.
        run: The run; None keeps them below the trainer's root directory.
        options: Fields of the configuration, if none is given.

    Raises:
        pydantic.ValidationError: An option does not fit.
    """

    config: LastCheckpointCallbackConfig
    """The configuration; not shared with any other run."""

    def __init__(
        self,
        config: LastCheckpointCallbackConfig | None = None,
        *,
        run: Run | None = None,
        **options: Any,
    ) -> None:
        config = resolve_config(LastCheckpointCallbackConfig, config, options)
        name = _labelled("last", config.label)
        self.config = config
        super().__init__(
            config,
            Writer(
                identity=config.identity,
                folder_name=name,
                dirpath=config.dirpath,
                run=run,
                link_name=f"{name}.ckpt" if config.save_symlink else None,
                weights_only=config.save_weights_only,
            ),
            NameTemplate.parse(config.filename)
            if config.filename is not None
            else _default_template("-duration", "train_duration"),
        )
        self._seen_step = 0
        self._interval = config.save_on_time_interval
        if self._interval is None:
            silence_unused_hooks(self, "on_train_batch_end")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the interval is over: rank 0 asks its clock and tells the others."""
        # Between optimizer steps there are gradients that no checkpoint would hold.
        if self._interval is None or trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        is_due = (
            time.monotonic() - (self._last_time_checked or 0.0) >= self._interval.total_seconds()
        )
        if trainer.strategy.broadcast(is_due):
            self._save_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_due(trainer, pl_module)

    @override
    def _value(self, metrics: dict[str, float]) -> float | None:
        return None

    @override
    def _competitors(self) -> list[Record]:
        return self.writer.on_the_way()

    @override
    def _rank(self, records: list[Record]) -> list[Record]:
        return newest_first(records)


def _default_template(prefix: str, key: str) -> NameTemplate:
    return NameTemplate(("epoch", Key("epoch"), "-step", Key("step"), prefix, Key(key)))


def _labelled(name: str, label: str | None) -> str:
    return f"{name}-{label}" if label else name
