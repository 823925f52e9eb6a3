"""Configuration of norm logging: which norms, of what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, StrictBool
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import PositiveFloat

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["NormLoggingCallbackConfig", "NormType"]


def _number_in_text(value: Any) -> Any:
    """Existing configurations say `"2"` and `"inf"`; what is no number is left for the check."""
    if isinstance(value, str) or type(value) is int:
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value


NormType: TypeAlias = Annotated[StrictBool | PositiveFloat, BeforeValidator(_number_in_text)]
"""False: not logged. True: the 2-norm. A number above 0, or `inf`: that p-norm."""


@callback_registry.register
class NormLoggingCallbackConfig(CallbackConfigBase):
    """Logs norms of gradients and parameters, once per optimizer step that is logged.

    Gradients are measured after accumulation and unscaling, before clipping; parameters before
    they are updated. At other steps nothing is computed. With several optimizers `train/` becomes
    `train/optimizer_{i}/`. All switched off: no callback.
    """

    name: Literal["norm_logging"] = "norm_logging"

    log_grad_norm: NormType = False
    """`train/grad_norm`, over all gradients of the optimizer; `train/grad_norm_clipped` too where
    the trainer clips."""

    log_grad_norm_per_param: NormType = False
    """`train/grad_{p}_norm/{parameter}` for every parameter with a gradient, and
    `train/grad_{p}_norm_total`."""

    log_param_norm: NormType = False
    """`train/param_norm`, over all parameters of the optimizer, with or without a gradient."""

    log_param_norm_per_param: NormType = False
    """`train/param_{p}_norm/{parameter}` for every parameter of the optimizer, and
    `train/param_{p}_norm_total`."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        wanted = (
            self.log_grad_norm,
            self.log_grad_norm_per_param,
            self.log_param_norm,
            self.log_param_norm_per_param,
        )
        if any(norm is not False for norm in wanted):
            from .callback import NormLoggingCallback

            yield NormLoggingCallback(self)
