"""Configuration of the callback that watches gradients and parameters with Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import PositiveInt

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["WandbWatchCallbackConfig"]


@callback_registry.register
class WandbWatchCallbackConfig(CallbackConfigBase):
    """Sends histograms of gradients and parameters to Weights & Biases, as `wandb.watch` does.

    Needs a W&B logger; without one it says so and does nothing. Nothing is watched in a fast dev
    run. A module with a method `wandb_log_module()` chooses what is watched instead of itself.
    """

    name: Literal["wandb_watch"] = "wandb_watch"

    enabled: bool = True
    """Whether the callback is used."""

    log: Literal["gradients", "parameters", "all"] | None = "gradients"
    """What is recorded; None records no histograms, which leaves `log_graph`."""

    method: Literal["optimizer_step", "hooks"] = "optimizer_step"
    """Where gradients are read. `optimizer_step`: those that a step has used, so accumulated, unscaled,
    clipped and, where they are sharded, of all ranks; nothing is put on the module. `hooks`: those
    of each backward pass, as `wandb.watch` sees them. Compiled modules are read at the step."""

    log_graph: bool = False
    """Whether the module graph is recorded too. Off by default: W&B hangs closures on every
    submodule for it, and until training ends the module cannot be pickled. Not of compiled modules."""

    log_freq: PositiveInt = 1000
    """Optimizer steps between two records (with `hooks`, for gradients, backward passes). A record waits
    for the device once; other steps compute nothing."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled:
            from .callback import WandbWatchCallback

            yield WandbWatchCallback(self)
