"""Checks that required metrics are logged, and their values."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.errors import ConfigError
from nshtrainer.runtime.step_metrics import fetch

from .checking import describe_missing, is_validation_metric
from .config import MetricValidationCallbackConfig
from .values import describe_values, find_disagreement, find_wrong_value

if TYPE_CHECKING:
    from nshtrainer.metric import MetricConfig

__all__ = ["MetricValidationCallback"]

log = logging.getLogger(__name__)

# Lightning's ModelCheckpoint knows these without anyone logging them.
_ALWAYS_KNOWN = frozenset({"epoch", "step"})


class MetricValidationCallback(ConfiguredCallback[MetricValidationCallbackConfig]):
    """Looks for required metrics in `trainer.callback_metrics` during `fit`.

    See `MetricValidationCallbackConfig`. A metric that was found once is not looked for again.

    Args:
        config: The configuration.
        primary_metric: The run's main metric, looked for if the configuration says so.
        options: The configuration's fields, if none is given.

    Raises:
        ConfigError: In `fit`, on every rank: a metric is missing or has a value that is not
            allowed, on any of them, and `error_behavior` is `raise`.
    """

    config_class = MetricValidationCallbackConfig

    def __init__(
        self,
        config: MetricValidationCallbackConfig | None = None,
        *,
        primary_metric: MetricConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self._primary = primary_metric if self.config.validate_default_metric else None
        self._start_anew()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._settled: set[str] = set()
        self._warned: set[str] = set()
        self._rehearsed = False
        self._validated = False
        self._trained = False

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rehearsed:  # there may be no batch to validate with
            self._check(trainer, "after the sanity check", val_only=True)
            self._check_values(trainer, "after the sanity check")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if trainer.sanity_checking:
            self._rehearsed = True
            return
        when = f"after {'a' if self._validated else 'the first'} validation"
        self._validated = True
        if self._trained:
            self._check_all(trainer)
        else:
            self._check(trainer, when, val_only=True)
        self._check_values(trainer, when)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What the module logs in on_train_epoch_end is there from now on.
        if self._trained and self._validated:
            self._check_all(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trained and self._validated:
            self._check_all(trainer)

    def _check_all(self, trainer: Trainer) -> None:
        self._check(trainer, "after an epoch of training and validation", val_only=False)

    def _check(self, trainer: Trainer, when: str, *, val_only: bool) -> None:
        due = {
            name: source
            for name, source in self._required(trainer).items()
            if name not in self._settled and (not val_only or is_validation_metric(name))
        }
        if not due:
            return
        logged = list(trainer.callback_metrics)
        found = _of_all_ranks(trainer, [float(name in logged) for name in due])
        missing = {
            name: source + _where([row[index] for row in found])
            for index, (name, source) in enumerate(due.items())
            if not all(row[index] for row in found)
        }
        # What the sanity check has seen is looked for once more: it is not the training.
        self._settled |= set(missing if trainer.sanity_checking else due)
        if missing:
            self._report(trainer, describe_missing(missing, len(due), logged, when=when))

    def _check_values(self, trainer: Trainer, when: str) -> None:
        c = self.config
        if not (c.check_finite or c.ranges or c.check_ranks_agree):
            return
        names = list(self._required(trainer))
        metrics = {n: torch.as_tensor(v) for n, v in trainer.callback_metrics.items() if n in names}
        scalars = {name: value for name, value in metrics.items() if value.numel() == 1}
        numbers = dict(zip(scalars, fetch(list(scalars.values())), strict=True))
        # Whether there is a value, and the value: every rank sees those of all and decides alike.
        mine = [x for name in names for x in (float(name in numbers), numbers.get(name, 0.0))]
        rows = _of_all_ranks(trainer, mine)
        wrong: dict[str, str] = {}
        for index, name in enumerate(names):
            values = [row[2 * index + 1] if row[2 * index] else None for row in rows]
            if (problem := self._problem(name, values)) and name not in self._warned:
                wrong[name] = problem
        if wrong:
            self._warned |= set(wrong)
            self._report(trainer, describe_values(wrong, when=when))

    def _problem(self, name: str, values: list[float | None]) -> str | None:
        bounds = self.config.ranges.get(name)
        for value in values:
            if value is not None and (
                problem := find_wrong_value(value, bounds, finite=self.config.check_finite)
            ):
                return problem
        return find_disagreement(values) if self.config.check_ranks_agree else None

    def _report(self, trainer: Trainer, message: str) -> None:
        if self.config.error_behavior == "raise":
            raise ConfigError(message)
        if trainer.is_global_zero:
            log.warning("%s", message)

    def _required(self, trainer: Trainer) -> dict[str, str]:
        """Each required metric's name, and who asks for it."""
        required: dict[str, str] = {}
        for metric in self.config.metrics:
            name = metric if isinstance(metric, str) else metric.name
            required.setdefault(name, "metric_validation.metrics")
        for name in self.config.ranges:
            required.setdefault(name, "metric_validation.ranges")
        if self._primary is not None:
            required.setdefault(self._primary.name, "primary_metric")
        lightning: Any = trainer  # `callbacks` is set by a connector, unknown to type checkers
        callbacks: list[Any] = lightning.callbacks
        for callback in callbacks:
            name = getattr(callback, "monitor", None)
            # strict=False is how early stopping says that its metric may be absent.
            if isinstance(name, str) and getattr(callback, "strict", True):
                required.setdefault(name, type(callback).__name__)
        if trainer.lightning_module.automatic_optimization:
            for scheduler in trainer.lr_scheduler_configs:
                name = scheduler.monitor
                if scheduler.reduce_on_plateau and name is not None and scheduler.strict:
                    required.setdefault(name, type(scheduler.scheduler).__name__)
        return {n: source for n, source in required.items() if n not in _ALWAYS_KNOWN}


def _of_all_ranks(trainer: Trainer, values: list[float]) -> list[list[float]]:
    """*values* of each rank; all of them call this with as many."""
    if trainer.world_size == 1 or not values:
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return cast("list[list[float]]", trainer.strategy.all_gather(mine).tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub


def _where(found: list[float]) -> str:
    """On which ranks something was not found, if that is not all of them."""
    ranks = [str(rank) for rank, is_there in enumerate(found) if not is_there]
    return "" if len(ranks) == len(found) else f" (missing on rank {', '.join(ranks)})"
