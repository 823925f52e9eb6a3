"""Configuration of the callback that uploads checkpoints to Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["WandbCheckpointsCallbackConfig"]


@callback_registry.register
class WandbCheckpointsCallbackConfig(CallbackConfigBase):
    """Uploads checkpoints to Weights & Biases, as versions of one artifact `model-<run id>`.

    Those of nshtrainer-checkpoint, files and sharded directories, once they are complete; of a run
    that fails too. The newest version has the alias `latest`, the one that ranks first `best`. Needs
    a W&B logger, whose `log_model` brings this callback along.
    """

    name: Literal["wandb_checkpoints"] = "wandb_checkpoints"

    enabled: bool = True
    """Whether the callback is used."""

    upload: Literal["all", "latest"] = "latest"
    """`all`: each when it is saved, in the background; a version whose checkpoint is deleted (`topk`) is
    deleted too. `latest`: those that are left when training ends. An offline run, which could take
    nothing back, does the latter."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled:
            from .callback import WandbCheckpointsCallback

            yield WandbCheckpointsCallback(self)
