"""`ActSaveCallback`: `nshutils.ActSave` is on while the trainer runs, under the stage's name."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.run.run import Run

from .config import ActSaveConfig, require_nshutils

__all__ = ["ActSaveCallback"]

log = logging.getLogger(__name__)


class ActSaveCallback(ConfiguredCallback[ActSaveConfig]):
    """Stores what the model hands to `ActSave`, in a new numbered folder for each stage of the run.

    Names start with `train`, `validation`, `test` or `predict`; those of a validation inside
    training with `validation` alone. ActSave is off again when the stage ends, by an exception too.
    An ActSave that was on before is used as it is and stays on. ActSave knows one process only:
    with more, nothing is stored and a warning says so.

    Args:
        config: The configuration.
        run: Tells the default folder; without it that is `activation` in the trainer's
            `default_root_dir`.
        options: Fields of the configuration, if none is given.

    Raises:
        PluginLoadError: nshutils is not installed.
    """

    config_class: ClassVar[type[CallbackConfigBase]] = ActSaveConfig

    def __init__(
        self, config: ActSaveConfig | None = None, *, run: Run | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        if self.config.enabled:
            require_nshutils()
        self._run = run
        self._enabled = ExitStack()
        self._context = ExitStack()
        self._labels: list[str] = []
        self._is_on = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._run is not None:
            self._run.settle(trainer)
        self._close()
        if not self.config.enabled:
            return
        if trainer.world_size > 1:
            log.warning(
                "the callback 'act_save' stores nothing: nshutils.ActSave works in one process, and "
                "there are %d; run on one device, or remove the callback",
                trainer.world_size,
            )
            return
        self._enabled.enter_context(_act_save().enabled(self._save_dir(trainer)))
        self._is_on = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()  # Lightning does not call teardown after an exception

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("train")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("train")

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("validation")

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("validation")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("test")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("test")

    @override
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("predict")

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("predict")

    def _save_dir(self, trainer: Trainer) -> Path:
        if (chosen := self.config.save_dir) is not None:
            return chosen
        if self._run is not None:
            return self._run.directory.ensure("activation")
        return Path(trainer.default_root_dir) / "activation"

    def _enter(self, label: str) -> None:
        if self._is_on:
            self._labels.append(label)
            self._switch()

    def _leave(self, label: str) -> None:
        if self._labels and self._labels[-1] == label:
            self._labels.pop()
            self._switch()

    def _switch(self) -> None:
        """Let ActSave prefix the innermost stage's name only: `validation`, not `train.validation`."""
        self._context.close()
        if self._labels:
            self._context.enter_context(_act_save().context(self._labels[-1]))

    def _close(self) -> None:
        self._labels.clear()
        self._is_on = False
        self._context.close()
        self._enabled.close()


def _act_save() -> Any:
    from nshutils.actsave import ActSave  # pyright: ignore[reportMissingTypeStubs] -- an extra

    return ActSave
