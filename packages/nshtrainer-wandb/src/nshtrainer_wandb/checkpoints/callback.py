"""`WandbCheckpointsCallback`: hears of checkpoints and has them uploaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer_wandb.logger.finding import find_wandb_logger

from .config import WandbCheckpointsCallbackConfig
from .uploads import CheckpointUploads

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbCheckpointsCallback"]

log = logging.getLogger(__name__)


class WandbCheckpointsCallback(ConfiguredCallback[WandbCheckpointsCallbackConfig]):
    """Uploads what `on_checkpoint_saved` tells of, and follows `on_checkpoint_removed`; rank zero.

    Whatever goes wrong is a warning. A checkpoint that is saved while an exception is handled goes
    up before the run is finished.

    Args:
        config: The configuration.
        options: Its fields, if no configuration is given.
    """

    config_class: ClassVar[type[CallbackConfigBase]] = WandbCheckpointsCallbackConfig

    def __init__(
        self, config: WandbCheckpointsCallbackConfig | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self._uploads: CheckpointUploads | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts anew: run and thread belong to this process."""
        return {**self.__dict__, "_uploads": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._uploads = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_off = not self.config.enabled or trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- set by Lightning's connector
        if is_off or not trainer.is_global_zero:
            return
        logger = find_wandb_logger(trainer, "the callback 'wandb_checkpoints' uploads nothing")
        if logger is None:
            return
        run = cast("Run", logger.experiment)
        if not run.disabled:
            self._uploads = CheckpointUploads(run, at_once=self.config.upload == "all")

    def on_checkpoint_saved(
        self, trainer: Trainer, pl_module: LightningModule, path: Path, metadata: Mapping[str, Any]
    ) -> None:
        """Upload it now, or remember it."""
        if self._uploads is not None:
            self._uploads.saved(path, metadata, best=_best_of(trainer))

    def on_checkpoint_removed(
        self, trainer: Trainer, pl_module: LightningModule, path: Path
    ) -> None:
        """Take it back, or forget it."""
        if self._uploads is not None:
            self._uploads.removed(path)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Checkpoint callbacks come later and may save once more; that goes up when it is told of.
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if self._uploads is not None:
            self._uploads.finish(best=_best_of(trainer))


def _best_of(trainer: Trainer) -> set[str]:
    """Paths of the checkpoints that rank first by a metric."""
    callbacks = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    return {str(c.best_model_path) for c in callbacks if c.monitor is not None}  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] -- typed loosely by Lightning
