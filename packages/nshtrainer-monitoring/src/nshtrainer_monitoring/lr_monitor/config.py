"""Configuration of the learning rate monitor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["LearningRateMonitorConfig"]


@callback_registry.register
class LearningRateMonitorConfig(CallbackConfigBase):
    """Logs the learning rate of every parameter group, under the names Lightning's monitor uses.

    `lr-AdamW`, `lr-AdamW/<group>` with several groups, `lr-AdamW-1` for a second optimizer of one
    class, a scheduler's own `name` where it has one. Works without schedulers, in manual
    optimization, and without loggers: the values are in `trainer.callback_metrics` too.
    """

    name: Literal["learning_rate_monitor"] = "learning_rate_monitor"

    logging_interval: Literal["step", "epoch"] | None = None
    """When to log: at the steps that Lightning logs, or at the start of each epoch. None: each
    optimizer at the interval of its scheduler; one without a scheduler at both, and in manual
    optimization, where only the module knows when it steps its schedulers, every one."""

    prefix: str = ""
    """Put before every name: `train/` makes `train/lr-AdamW`."""

    log_momentum: bool = False
    """Also log `...-momentum`: `momentum`, or the first of `betas`; 0 for optimizers without."""

    log_weight_decay: bool = False
    """Also log `...-weight_decay`; 0 for optimizers without."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import LearningRateMonitorCallback

        yield LearningRateMonitorCallback(self)
