"""Configuration of the gradient checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["Action", "FiniteChecksCallbackConfig"]


def _action(value: Any) -> Any:
    """Existing configurations switch checks on and off."""
    if isinstance(value, bool):
        return "warn" if value else "ignore"
    return value


Action: TypeAlias = Annotated[Literal["ignore", "warn", "raise"], BeforeValidator(_action)]
"""What to do about a finding; True stands for `warn`, False for `ignore`."""


@callback_registry.register
class FiniteChecksCallbackConfig(CallbackConfigBase):
    """Checks the gradients of each optimizer step, after accumulation and unscaling.

    Under a GradScaler (`16-mixed`) non-finite gradients are how the scale is found; they count as
    a finding only if they do not stop.
    """

    name: Literal["finite_checks"] = "finite_checks"

    nonfinite_grads: Action = "warn"
    """NaN or Inf in a gradient. `warn` waits for the device at logging steps only, and reports
    then what was found since the last one. `raise` looks at every step, and stops the run before
    the weights change."""

    none_grads: Action = "warn"
    """A trainable parameter of the optimizer without a gradient. `warn` names each once, `raise`
    stops the run before the weights change."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.nonfinite_grads != "ignore" or self.none_grads != "ignore":
            from .callback import FiniteChecksCallback

            yield FiniteChecksCallback(self)
