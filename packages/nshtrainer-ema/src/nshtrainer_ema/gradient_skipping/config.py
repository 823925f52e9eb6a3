"""Configuration of the callback that leaves out optimizer steps with exploding gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import NonNegativeInt, PositiveFloat

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["GradientSkippingCallbackConfig"]


def _number_in_text(value: Any) -> Any:
    """Existing configurations say `"2"` and `"inf"`; what is no number is left for the check."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


@callback_registry.register
class GradientSkippingCallbackConfig(CallbackConfigBase):
    """Leaves out an optimizer step whose gradient norm is too large.

    The norm is that of all gradients of one optimizer, after accumulation and unscaling, before
    clipping. A step that is left out changes neither weights nor optimizer state; `global_step`
    and learning rate schedules go on.
    """

    name: Literal["gradient_skipping"] = "gradient_skipping"

    threshold: PositiveFloat
    """Largest finite norm that is applied; `inf` applies them all."""

    norm_type: Annotated[PositiveFloat, BeforeValidator(_number_in_text)] = 2.0
    """p of the p-norm; `inf` is the largest absolute value."""

    start_after_n_steps: NonNegativeInt | None = 100
    """The first so many optimizer steps of the training are applied whatever their norm; None or 0
    is from the start."""

    skip_non_finite: bool = False
    """True: a step with a NaN or Inf norm is left out. False: it is applied, which leaves it to the
    loss scaler of `16-mixed`; without one, the weights become NaN."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import GradientSkippingCallback

        yield GradientSkippingCallback(self)
