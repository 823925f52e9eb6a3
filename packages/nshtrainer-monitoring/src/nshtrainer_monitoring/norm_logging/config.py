"""Configuration of norm logging: which norms, of what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, StrictBool, model_validator
from typing_extensions import Self, override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import Glob, PositiveFloat, PositiveInt

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
    """Logs norms of gradients, parameters, updates and moments, at optimizer steps that are logged.

    Gradients are measured after accumulation and unscaling, before clipping; parameters before
    they are updated; updates and moments after that. At other steps nothing is computed and
    nothing is copied. With several optimizers `train/` becomes `train/optimizer_{i}/`; with a
    `label`, `/{label}` is appended to every name. All switched off: no callback.
    """

    name: Literal["norm_logging"] = "norm_logging"

    log_grad_norm: NormType = False
    """`train/grad_norm`, over all gradients of the optimizer; where they are clipped also
    `train/grad_norm_clipped` and, if clipping is by norm, `train/grad_clip_coefficient`."""

    log_grad_norm_per_param: NormType = False
    """`train/grad_{p}_norm/{parameter}` for every parameter with a gradient, and
    `train/grad_{p}_norm_total`."""

    log_grad_norm_per_module: NormType = False
    """`train/grad_{p}_module_norm/{module}` for every module down to `module_depth`."""

    log_param_norm: NormType = False
    """`train/param_norm`, over all parameters of the optimizer, with or without a gradient."""

    log_param_norm_per_param: NormType = False
    """`train/param_{p}_norm/{parameter}` for every parameter of the optimizer, and
    `train/param_{p}_norm_total`."""

    log_param_norm_per_module: NormType = False
    """`train/param_{p}_module_norm/{module}` for every module down to `module_depth`."""

    log_update_norm: NormType = False
    """`train/update_norm`, of what the step changed in the weights; 0 where it was skipped. Holds a
    copy of the optimizer's parameters during each step that is logged."""

    log_update_norm_per_param: NormType = False
    """`train/update_{p}_norm/{parameter}` and `train/update_{p}_norm_total`."""

    log_update_norm_per_module: NormType = False
    """`train/update_{p}_module_norm/{module}` for every module down to `module_depth`."""

    log_update_ratio: NormType = False
    """`train/update_ratio`, the norm of the update divided by that of the weights before it: 0 if
    nothing changed, `inf` if all weights were 0."""

    log_update_ratio_per_param: NormType = False
    """`train/update_{p}_ratio/{parameter}` for every parameter of the optimizer."""

    log_update_ratio_per_module: NormType = False
    """`train/update_{p}_module_ratio/{module}` for every module down to `module_depth`."""

    log_moment_norm: NormType = False
    """`train/exp_avg_norm` and `train/exp_avg_sq_norm`, of what the optimizer keeps under these
    names after the step, as Adam and its relatives do."""

    log_moment_norm_per_param: NormType = False
    """`train/exp_avg_{p}_norm/{parameter}`, `train/exp_avg_{p}_norm_total`, and the same of
    `exp_avg_sq`."""

    log_moment_norm_per_module: NormType = False
    """`train/exp_avg_{p}_module_norm/{module}`, and the same of `exp_avg_sq`."""

    module_depth: PositiveInt = 1
    """How deep modules are looked into: 1 for `encoder`, 2 for `encoder.layers` too. A module's norm
    is over all parameters below it; those that belong to no module are in the totals only."""

    include: list[Glob] | None = None
    """Log single parameters only if their names match one of these globs, such as `encoder.*`;
    None is all. Totals and modules are over all parameters nevertheless."""

    exclude: list[Glob] = Field(default_factory=list[Glob])
    """Log no single parameter whose name matches one of these globs."""

    prog_bar: bool = False
    """Show the totals in the progress bar too: every metric above that is one number for all parameters
    of an optimizer."""

    @model_validator(mode="after")
    def _check_globs(self) -> Self:
        if (self.include is not None or self.exclude) and not self._logs_single_parameters:
            raise ValueError(
                "`include` and `exclude` choose which parameters are logged singly, and none are; "
                "switch on an option that ends in `_per_param`, or remove them"
            )
        return self

    @property
    def _logs_single_parameters(self) -> bool:
        return any(
            getattr(self, name) is not False
            for name in type(self).model_fields
            if name.endswith("_per_param")
        )

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        options = (name for name in type(self).model_fields if name.startswith("log_"))
        if any(getattr(self, name) is not False for name in options):
            from .callback import NormLoggingCallback

            yield NormLoggingCallback(self)
