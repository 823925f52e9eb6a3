"""Configuration of the callback that lets `nshutils.ActSave` store activations."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.errors import PluginLoadError

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["ActSaveConfig", "require_nshutils"]


@callback_registry.register
class ActSaveConfig(CallbackConfigBase):
    """Turns `nshutils.ActSave` on while the trainer runs, under the stage's name.

    What the model hands to `ActSave({...})` is stored below `train`, `validation`, `test` or
    `predict`. Needs the extra `actsave`.
    """

    name: Literal["act_save"] = "act_save"

    enabled: bool = True
    """Whether activations are stored; if not, nothing is imported and no folder is made."""

    save_dir: Path | None = None
    """Where to; None is `<run>/activation`."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        """Yield the callback.

        Raises:
            PluginLoadError: nshutils is not installed.
        """
        if not self.enabled:
            return
        require_nshutils()
        from .callback import ActSaveCallback

        yield ActSaveCallback(self, run=trainer_config.run)


def require_nshutils() -> None:
    """Raise if nshutils cannot be imported.

    Raises:
        PluginLoadError: It is not installed.
    """
    if importlib.util.find_spec("nshutils") is None:
        raise PluginLoadError(
            "the callback 'act_save' needs the package nshutils, which is not installed; "
            "run `pip install nshtrainer-wandb[actsave]`, or set `enabled: false`"
        )
