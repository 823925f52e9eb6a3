"""Checks that required metrics are logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.errors import ConfigError

from .checking import describe_missing, is_validation_metric
from .config import MetricValidationCallbackConfig

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
        ConfigError: In `fit`, on every rank: a metric is missing and `error_behavior` is `raise`.
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
        self._settled: set[str] = set()
        self._validated = False
        self._trained = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._settled, self._validated, self._trained = set(), False, False

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, "after the sanity check", val_only=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = True
        if self._trained:
            self._check_all(trainer)
        else:
            self._check(trainer, "after the first validation", val_only=True)

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
        missing = {name: source for name, source in due.items() if name not in logged}
        # What the sanity check has seen is looked for once more: it is not the training.
        self._settled |= set(missing if trainer.sanity_checking else due)
        if not missing:
            return
        message = describe_missing(missing, len(due), logged, when=when)
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
        if self._primary is not None:
            required.setdefault(self._primary.name, "primary_metric")
        lightning: Any = trainer  # `callbacks` is set by a connector, unknown to type checkers
        callbacks: list[Any] = lightning.callbacks
        for callback in callbacks:
            name = getattr(callback, "monitor", None)
            # strict=False is how early stopping says that its metric may be absent.
            if isinstance(name, str) and getattr(callback, "strict", True):
                required.setdefault(name, type(callback).__name__)
        return {n: source for n, source in required.items() if n not in _ALWAYS_KNOWN}
