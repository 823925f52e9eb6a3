"""`BestCheckpointCallback` and `LastCheckpointCallback`: what to rank by, and when to save."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from nshtrainer.callbacks.callback import resolve_config
from nshtrainer.errors import ConfigError
from nshtrainer.spelling import nearest

from .base import CheckpointCallback
from .config import BestCheckpointCallbackConfig, LastCheckpointCallbackConfig
from .metadata import Record
from .moment import Moment
from .names import Key, NameTemplate, slug
from .retention import Keep
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
                links=config.links or "symlink",
                weights_only=config.save_weights_only,
            ),
            NameTemplate.parse(config.filename)
            if config.filename is not None
            else _default_template(f"-{slug(metric.name)}", metric.name),
            Keep(
                "best",
                mode=metric.mode,
                topk=_number(config.topk),
                max_bytes=config.max_total_bytes,
            ),
            metric,
        )
        self._before: Any = None
        self._waits_for_epoch = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._before, self._waits_for_epoch = None, False  # of an earlier fit

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._before = trainer.callback_metrics.get(self._metric.name)

    @override
    def wants(self, trainer: Trainer, moment: Moment) -> bool:
        if moment == "epoch_end" and self._waits_for_epoch:
            self._waits_for_epoch = False
            return self._is_new(trainer, moment)
        if not super().wants(trainer, moment):
            return False
        if moment == "epoch_end":
            return True
        # Lightning keeps the value of the epoch before until a training metric is reduced again,
        # which is after the validation. Rank 0 decides: the others may not have logged it at all.
        is_there = trainer.strategy.broadcast(self._metric.name in self.logged(trainer, moment))
        self._waits_for_epoch = moment == "validation_end" and not is_there
        return is_there

    @override
    def logged(self, trainer: Trainer, moment: Moment) -> dict[str, Any]:
        """Without the metric, if nothing was logged for it since validation began, or in this step."""
        logged = super().logged(trainer, moment)
        name = self._metric.name
        is_old = self._before is not None and logged.get(name) is self._before
        if moment == "step":
            now: Any = trainer._logger_connector.metrics  # pyright: ignore[reportPrivateUsage] -- the only place that tells old values from new ones
            is_old = name not in now["callback"]
        if is_old:
            logged.pop(name, None)
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
                links=config.links or "symlink",
                weights_only=config.save_weights_only,
            ),
            NameTemplate.parse(config.filename)
            if config.filename is not None
            else _default_template("-duration", "train_duration"),
            Keep(
                "newest",
                topk=_number(config.topk),
                every_n_steps=config.keep_every_n_steps,
                max_bytes=config.max_total_bytes,
            ),
        )
        self._interval = config.save_on_time_interval

    @override
    def _listens_to(self) -> frozenset[Moment]:
        config = self.config
        moments: set[Moment] = {*super()._listens_to()}
        if config.on_train_end:
            moments.add("train_end")
        if config.before_validation:
            moments.add("validation_start")
        if config.save_on_time_interval is not None or config.keep_every_n_steps is not None:
            moments.add("step")
        if self.preemption_signals:
            moments.add("preemption")
        return frozenset(moments)

    @override
    def _is_step_due(self, trainer: Trainer) -> bool:
        """Also when the interval is over: rank 0 asks its clock and tells the others."""
        if super()._is_step_due(trainer) or self._passes(trainer, self.config.keep_every_n_steps):
            return True
        if self._interval is None:
            return False
        since = time.monotonic() - (self._last_time_checked or 0.0)
        return trainer.strategy.broadcast(since >= self._interval.total_seconds())

    @override
    def _value(self, metrics: dict[str, float]) -> float | None:
        return None

    @override
    def _competitors(self) -> list[Record]:
        return self.writer.on_the_way()


def _default_template(prefix: str, key: str) -> NameTemplate:
    return NameTemplate(("epoch", Key("epoch"), "-step", Key("step"), prefix, Key(key)))


def _number(topk: int | Literal["all"]) -> int | None:
    return None if topk == "all" else topk


def _labelled(name: str, label: str | None) -> str:
    return f"{name}-{label}" if label else name
