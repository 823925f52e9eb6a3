"""Configuration of the callback that leaves out optimizer steps with exploding gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self, override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import NonNegativeInt, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["GradientSkippingCallbackConfig"]

_Finite = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
_AtLeastTwo = Annotated[PositiveInt, Field(ge=2)]
_Between0And1 = Annotated[PositiveFloat, Field(lt=1)]
_Percent = Annotated[PositiveFloat, Field(le=100)]

_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "zscore": ("sigmas", "statistics_decay", "warmup_steps"),
    "sigma": ("sigmas", "window", "warmup_steps"),
    "percentile": ("percentile", "percentile_factor", "window", "warmup_steps"),
}
"""Policy to the options that it has."""


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
    """Leaves out, or clips, an optimizer step whose gradient norm is too large.

    The norm is that of all gradients of one optimizer, after accumulation and unscaling, before
    clipping. It is too large above `threshold`, or above what `policy` makes of the norms so far;
    give one of them or both. A step that is left out changes neither weights nor optimizer state;
    `global_step` goes on, and learning rate schedules do unless `hold_scheduler`.
    """

    name: Literal["gradient_skipping"] = "gradient_skipping"

    threshold: PositiveFloat | None = None
    """Largest finite norm that is applied; `inf` applies them all, None leaves it to `policy`."""

    norm_type: Annotated[PositiveFloat, BeforeValidator(_number_in_text)] = 2.0
    """p of the p-norm; `inf` is the largest absolute value."""

    start_after_n_steps: NonNegativeInt | None = 100
    """The first so many optimizer steps of the training are applied whatever their norm; None or 0
    is from the start. A policy learns from them."""

    skip_non_finite: bool = False
    """True: a step with a NaN or Inf norm is left out. False: it is applied, which leaves it to the
    loss scaler of `16-mixed`; without one, the weights become NaN."""

    policy: Literal["zscore", "sigma", "percentile"] | None = None
    """What else is too large, by the norms of this optimizer so far. `zscore`: `sigmas` standard
    deviations above a moving average (ZClip, https://arxiv.org/abs/2504.02507). `sigma`: `sigmas`
    standard deviations above the mean of a window (OLMo-core's SkipStepOptimizer). `percentile`: above
    a percentile of a window (AutoClip, Seetharaman et al. 2020). None: nothing."""

    action: Literal["skip", "clip", "raise"] = "skip"
    """What happens to a step whose finite norm is too large. `skip`: it is left out. `clip`: its
    gradients are scaled down to the largest norm that is not. `raise`: training stops with a
    GradientSpikeError before it, which waits for the device at every step."""

    sigmas: _Finite | None = None
    """Policies `zscore` and `sigma`: how many standard deviations above the mean are too large; None is
    2.5 for `zscore` and 6 for `sigma`, as in the sources. Below 2, what is kept out of the statistics
    narrows them step by step."""

    statistics_decay: _Between0And1 | None = None
    """Policy `zscore`: mean and variance are `decay * old + (1 - decay) * new`; None is 0.97."""

    window: _AtLeastTwo | None = None
    """Policies `sigma` and `percentile`: how many of the latest norms count; None is 128 for `sigma`
    and 1000 for `percentile`."""

    percentile: _Percent | None = None
    """Policy `percentile`, which needs it: the percentile in (0, 100], interpolated as NumPy does.
    AutoClip's authors clip at 10; about 95 with a factor leaves out spikes only."""

    percentile_factor: _Finite | None = None
    """Policy `percentile`: what the percentile is multiplied by; None is 1."""

    warmup_steps: _AtLeastTwo | None = None
    """The policy begins when it has so many norms; None is 25 for `zscore`, half the window and at
    least 20 for `sigma`, and 100 for `percentile`."""

    max_consecutive: PositiveInt | None = None
    """So many left-out steps of one optimizer in a row stop training with a ConsecutiveSkipsError;
    None never does. Where only the device knows (fused optimizers), it is raised at the next
    logging step or at the end of the epoch."""

    hold_scheduler: bool = False
    """True: learning rate schedules with interval `step` do not advance on a step that is left out;
    not those on a plateau, and not with manual optimization, which is refused. The host then waits
    for the device at every step."""

    prog_bar: bool = False
    """Show `train/grad_skipped_steps`, and with action `clip` `train/grad_clipped_steps`, in the
    progress bar too."""

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        if self.threshold is None and self.policy is None:
            raise _error(
                "neither threshold nor policy is given, so that no norm would be too large; give a "
                "threshold, the largest norm that is applied (inf for all), or a policy (zscore, "
                "sigma, percentile)"
            )
        known = _OPTIONS.get(self.policy or "", ())
        for option in sorted({o for options in _OPTIONS.values() for o in options} - {*known}):
            if getattr(self, option) is not None:
                having = " and ".join(p for p, options in _OPTIONS.items() if option in options)
                raise _error(
                    f"{option} is given, which belongs to the policies {having}, and policy is "
                    f"{self.policy!r}; remove {option} or choose such a policy"
                )
        return self

    @model_validator(mode="after")
    def _check_percentile(self) -> Self:
        if self.policy != "percentile":
            return self
        if self.percentile is None:
            raise _error(
                "policy 'percentile' has no percentile; give one, such as 95 with percentile_factor "
                "3 to leave out spikes, or 10 with action 'clip' as AutoClip"
            )
        if (self.percentile_factor or 1.0) > 1:
            return self
        if self.action == "raise" or (self.action == "skip" and self.percentile < 50):
            raise _error(
                f"action {self.action!r} with percentile {self.percentile:g} would "
                f"{'stop a healthy run' if self.action == 'raise' else 'leave out most steps'}, since "
                f"{100 - self.percentile:g}% of all norms are above it; give a percentile_factor above "
                "1, or action 'clip'"
            )
        return self

    @model_validator(mode="after")
    def _check_what_is_left_out(self) -> Self:
        if self.action == "skip" or self.skip_non_finite:
            return self
        for option in ("max_consecutive", "hold_scheduler"):
            if getattr(self, option):
                raise _error(
                    f"{option} is given, but no step is ever left out with action {self.action!r} and "
                    f"skip_non_finite false; remove {option}, or choose action 'skip'"
                )
        return self

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import GradientSkippingCallback

        yield GradientSkippingCallback(self)


def _error(message: str) -> PydanticCustomError:
    return PydanticCustomError("gradient_skipping", "{message}", {"message": message})
