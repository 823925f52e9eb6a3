"""Configuration of the callback that scales the gradients of shared parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["SharedParametersCallbackConfig"]


@callback_registry.register
class SharedParametersCallbackConfig(CallbackConfigBase):
    """Divides the gradients of parameters that are used several times, once per optimizer step.

    The module has a property `shared_parameters`: pairs of a parameter and the number to divide its
    gradient by, often how many times it is used. Without that property, it is the number of names
    that the parameter has in the module.
    """

    name: Literal["shared_parameters"] = "shared_parameters"

    detect_ties: bool = True
    """Where the module has no property `shared_parameters`: divide each parameter that it has under
    several names by the number of these. False makes a missing property an error."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import SharedParametersCallback

        yield SharedParametersCallback(self)
