"""Configuration of the epoch timer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["EpochTimerCallbackConfig"]


@callback_registry.register
class EpochTimerCallbackConfig(CallbackConfigBase):
    """Logs the seconds that epochs take, of the slowest rank: `{stage}/epoch_time_s`.

    Stages are `train`, `val`, `test` and `predict`. Validations inside a training epoch count for
    `val` only. An epoch that was resumed counts what it had taken before.
    """

    name: Literal["epoch_timer"] = "epoch_timer"

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import EpochTimerCallback

        yield EpochTimerCallback(self)
