"""`ActSaveCallback`: `nshutils.ActSave` is on while the trainer runs, under the stage's name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import HOT_HOOKS, ConfiguredCallback, silence_unused_hooks
from nshtrainer.errors import ConfigError
from nshtrainer.run.run import Run
from nshtrainer.runtime.step_metrics import batches_that_stepped
from nshtrainer.selection import NameSelection

from .config import ActSaveConfig, require_nshutils
from .outputs import ModuleOutputs, traces_hooks
from .session import Budget, Session

__all__ = ["ActSaveCallback"]

log = logging.getLogger(__name__)

_NAMED = 5


class ActSaveCallback(ConfiguredCallback[ActSaveConfig]):
    """Stores activations in a new numbered folder for each call of the trainer; see `ActSaveConfig`.

    Names start with `train`, `validation`, `test` or `predict`; those of a validation inside
    training with `validation` alone. `step` is the `trainer.global_step` of each batch of which
    something was stored. ActSave is off again when the call ends, by an exception too. An ActSave that
    was on before is used as it is and stays on.

    Storing waits for the device. Steps that are not stored cost no wait and have no hooks.

    Args:
        config: The configuration.
        run: Tells the default folder; without it that is `activation` in the trainer's
            `default_root_dir`.
        options: Fields of the configuration, if none is given.

    Raises:
        PluginLoadError: nshutils is not installed.
        ConfigError: Before training, if a glob matches no submodule, or there is no such rank.
    """

    config_class: ClassVar[type[CallbackConfigBase]] = ActSaveConfig

    def __init__(
        self, config: ActSaveConfig | None = None, *, run: Run | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        if self.config.enabled:
            require_nshutils()
        else:
            silence_unused_hooks(self, *HOT_HOOKS)
        if not self.config.include:
            silence_unused_hooks(self, "on_before_backward", "on_after_backward")
        self._run = run
        self._budget = Budget(self.config.max_bytes)
        self._forget()

    def _forget(self) -> None:
        self._session: Session | None = None
        self._outputs: ModuleOutputs | None = None
        self._batch = ExitStack()
        self._step = 0
        self._labels: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what belongs to a running trainer."""
        return {
            **vars(self),
            "_session": None,
            "_outputs": None,
            "_batch": ExitStack(),
            "_labels": [],
        }

    # ---- on and off ------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._run is not None:
            self._run.settle(trainer)
        self._close()
        if not self.config.enabled:
            return
        self._check_ranks(trainer)
        if not self._is_mine(trainer):
            return
        try:
            self._session = Session(self._save_dir(trainer), self._budget, trainer)
        except OSError as error:
            log.warning("act_save stores nothing: %s", error)
            return
        self._session.on_close.push(self._batch)
        self._session.on_close.enter_context(traces_hooks())

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._say_what_was_not_called()
        self._close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()  # Lightning does not call teardown after an exception

    def _close(self) -> None:
        session = self._session
        self._forget()
        if session is not None:
            session.close()

    def _say_what_was_not_called(self) -> None:
        if self._session is None or self._outputs is None or self._session.is_spent:
            return
        if unseen := self._outputs.unseen:
            log.warning(
                "act_save has stored no output of %d submodules, which were not called at a stored step, "
                "or were compiled before the trainer ran: %s%s",
                len(unseen),
                ", ".join(unseen[:_NAMED]),
                ", ..." if len(unseen) > _NAMED else "",
            )

    def _check_ranks(self, trainer: Trainer) -> None:
        if isinstance(ranks := self.config.ranks, list):
            missing = [rank for rank in ranks if rank >= trainer.world_size]
            if missing:
                raise ConfigError(
                    f"act_save: `ranks` has {missing[0]}, and there are {trainer.world_size} processes; "
                    f"give ranks below that, or 'all'"
                )

    def _is_mine(self, trainer: Trainer) -> bool:
        ranks, rank = self.config.ranks, trainer.global_rank
        return ranks == "all" or rank in ([0] if ranks == "zero" else ranks)

    def _save_dir(self, trainer: Trainer) -> Path:
        folder = self._base_dir(trainer)
        if trainer.world_size == 1 or self.config.ranks == "zero":
            return folder
        return folder / f"rank_{trainer.global_rank}"

    def _base_dir(self, trainer: Trainer) -> Path:
        if (chosen := self.config.save_dir) is not None:
            return chosen.expanduser()
        if self._run is not None:
            return self._run.directory.ensure("activation")
        return Path(trainer.default_root_dir) / "activation"

    # ---- stages ----------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(pl_module)  # not in setup: `configure_model` comes after it

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("train")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("train")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(pl_module)
        self._enter("validation")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("validation")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(pl_module)
        self._enter("test")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(pl_module)
        self._enter("predict")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave("predict")

    def _choose(self, pl_module: LightningModule) -> None:
        """Find the submodules; on every rank, so that all of them refuse a glob that matches none."""
        config = self.config
        if not (config.enabled and config.include) or self._outputs is not None:
            return
        selection = NameSelection(config.include, config.exclude, "act_save", what="submodule")
        self._outputs = ModuleOutputs(pl_module, selection, config.reduce, self._store)

    def _enter(self, label: str) -> None:
        if self._session is not None:
            self._batch.close()
            self._labels.append(label)
            self._session.set_label(label)

    def _leave(self, label: str) -> None:
        if self._session is None or self._labels[-1:] != [label]:
            return
        self._batch.close()
        self._labels.pop()
        self._session.set_label(self._labels[-1] if self._labels else None)

    # ---- batches ---------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start(trainer, batches_that_stepped(trainer))

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._start(trainer, batch_idx)

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._outputs is not None:
            self._outputs.set_backward(True)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._outputs is not None:
            self._outputs.set_backward(False)

    def _start(self, trainer: Trainer, index: int) -> None:
        """Begin the batch that belongs to step *index* of the stage."""
        if (session := self._session) is None:
            return
        self._batch.close()
        if session.is_spent or index % self.config.every_n_steps:
            self._batch.enter_context(session.paused())
            return
        self._step, session.has_stored = trainer.global_step, False
        if self._outputs is not None:
            self._batch.enter_context(self._outputs.attached())

    def _end(self) -> None:
        if (session := self._session) is None:
            return
        if session.has_stored:
            session.store({"step": self._step})
            session.has_stored = False
        self._batch.close()

    def _store(self, tensors: Mapping[str, Tensor]) -> None:
        if self._session is not None:
            self._session.store(tensors)
