"""Configuration of the automatic debug flag."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["DebugFlagCallbackConfig"]


@callback_registry.register
class DebugFlagCallbackConfig(CallbackConfigBase):
    """Sets `trainer.debug` to True during a `fast_dev_run` and during the sanity check.

    Afterwards the flag is what it was, also after an exception.
    """

    name: Literal["debug_flag"] = "debug_flag"

    enabled: bool = True
    """False: no callback."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled:
            from .callback import DebugFlagCallback

            yield DebugFlagCallback(self)
