"""Configuration of the logged epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import MetricName

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["LogEpochCallbackConfig"]


@callback_registry.register
class LogEpochCallbackConfig(CallbackConfigBase):
    """Logs how many epochs of training are done, as a fraction: 1.5 in the middle of the second.

    The fraction comes from the batches that were processed, so accumulation and several optimizers
    do not change it. Where the number of batches is not known, the first whole epoch tells it: until
    then whole epochs are logged. A resumed run knows what the interrupted one has learned.
    """

    name: Literal["log_epoch"] = "log_epoch"

    metric_name: MetricName = "computed_epoch"
    """Name under which it is logged."""

    train: bool = True
    """Log during training, at the steps that Lightning logs, and at the end of each epoch."""

    val: bool = True
    """Log with each validation: how far training was."""

    test: bool = True
    """Log with each test: how far training was."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.train or self.val or self.test:
            from .callback import LogEpochCallback

            yield LogEpochCallback(self)
