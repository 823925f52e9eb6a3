"""Configuration of the finite checks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, model_validator
from typing_extensions import Self, override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["Action", "FiniteChecksCallbackConfig", "ParameterAction"]


def _action(value: Any) -> Any:
    """Existing configurations switch checks on and off."""
    if isinstance(value, bool):
        return "warn" if value else "ignore"
    return value


Action: TypeAlias = Annotated[
    Literal["ignore", "warn", "raise", "stop", "skip"], BeforeValidator(_action)
]
"""What to do about a finding; True stands for `warn`, False for `ignore`.

`warn`: say so, and apply the step. `raise`: end the run with an error. `stop`: end it as early
stopping does, with its last validation and checkpoint. `skip`: go on without this step. With the
last three the step is not applied: weights and moments are those of before.
"""

ParameterAction: TypeAlias = Annotated[
    Literal["ignore", "warn", "raise", "stop"], BeforeValidator(_action)
]
"""As `Action`; there is no step to skip."""


@callback_registry.register
class FiniteChecksCallbackConfig(CallbackConfigBase):
    """Checks each optimizer step for NaN, Inf and missing gradients, after accumulation and unscaling.

    Under a GradScaler (`16-mixed`) non-finite gradients are how the scale is found; they count as
    a finding only if they do not stop. All switched off: no callback.
    """

    name: Literal["finite_checks"] = "finite_checks"

    nonfinite_grads: Action = "warn"
    """NaN or Inf in a gradient. `warn` waits for the device at logging steps only, and reports
    then what was found since the last one; so does `skip` with torch's fused optimizers. `raise` and
    `stop` look at every step."""

    none_grads: Action = "warn"
    """A trainable parameter of the optimizer without a gradient. `warn` and `skip` name each once."""

    nonfinite_loss: Action = "ignore"
    """NaN or Inf in a loss, of any of the accumulated batches, before its backward pass. Under a
    GradScaler only NaN counts, as the scale can make a finite loss infinite. Waits for the device as
    `nonfinite_grads` does."""

    nonfinite_params: ParameterAction = "ignore"
    """NaN or Inf in a parameter, looked for when training starts and after each step that is
    logged, in a pass over the weights of its own."""

    find_module: bool = False
    """At the first finding of a run in loss or gradients, run the batches of the step again and name
    the first module whose output is not finite. Random numbers are those of the first time, and
    nothing of the second time stays. Looks at every step, whatever the action."""

    dump: bool = False
    """At the first finding of a run in a step, write its batches, the names and the random states to
    a file, one for each rank. Looks at every step, whatever the action."""

    dump_dir: Path | None = None
    """Folder of these files; None is `finite_checks` in the run's folder."""

    @model_validator(mode="after")
    def _check_explanations(self) -> Self:
        in_steps = (self.nonfinite_loss, self.nonfinite_grads)
        if (self.find_module or self.dump) and set(in_steps) == {"ignore"}:
            option = "find_module" if self.find_module else "dump"
            raise ValueError(
                f"`{option}` explains what `nonfinite_loss` and `nonfinite_grads` find, and both are "
                f"'ignore'; give one of them an action, or remove `{option}`"
            )
        if self.dump_dir is not None and not self.dump:
            raise ValueError(
                "`dump_dir` is where `dump` writes, which is off; set `dump`, or remove it"
            )
        return self

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        actions = (
            self.nonfinite_grads,
            self.none_grads,
            self.nonfinite_loss,
            self.nonfinite_params,
        )
        if any(action != "ignore" for action in actions):
            from .callback import FiniteChecksCallback

            yield FiniteChecksCallback(self, run=trainer_config.run)
