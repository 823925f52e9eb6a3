"""`OnExceptionCheckpointCallback`: one more checkpoint when training stops with an exception."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from nshtrainer.callbacks.callback import resolve_config, silence_unused_hooks

from .config import OnExceptionCheckpointCallbackConfig
from .forgiving import drop_what_cannot_be_stored, forgiving, isolate, stop_isolating
from .moment import abandon
from .names import Key, NameTemplate
from .places import Place
from .plain import make_plain
from .resume import ResumeState
from .source import check_source, leave_after_exception, stop_checking
from .storage import free_name
from .writer import Writer, newest_checkpoint, writers_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from nshtrainer.run.run import Run

__all__ = ["OnExceptionCheckpointCallback"]

log = logging.getLogger(__name__)


class OnExceptionCheckpointCallback(ModelCheckpoint):
    """Saves once more when `fit` stops with an exception (Ctrl-C, SIGTERM) after a step.

    Rank 0 saves by itself and waits for nobody: the others may be gone, or wait in a collective.
    Where state is sharded over ranks it therefore cannot save, and says so. Whatever else goes wrong
    meanwhile, in other callbacks' `on_exception` too, is logged; the exception that stopped
    training is the one that is raised, and what a callback cannot save is left out.

    A `ModelCheckpoint` since Lightning asks no other for `ckpt_path="last"`; no hook of it is used.

    Args:
        config: Where to save.
        run: The run; None keeps the checkpoint below the trainer's root directory.
        options: Fields of the configuration, if none is given.

    Raises:
        pydantic.ValidationError: An option does not fit.
    """

    config: OnExceptionCheckpointCallbackConfig

    finds_newest_checkpoint = True
    """`nshtrainer.Trainer` takes `ckpt_path="auto"` where a callback says so."""

    def __init__(
        self,
        config: OnExceptionCheckpointCallbackConfig | None = None,
        *,
        run: Run | None = None,
        **options: Any,
    ) -> None:
        self.config = resolve_config(OnExceptionCheckpointCallbackConfig, config, options)
        super().__init__(save_top_k=0, auto_insert_metric_name=False)
        name = f"on_exception-{self.config.label}" if self.config.label else "on_exception"
        self.writer = Writer(
            identity=self.config.identity,
            folder_name=name,
            dirpath=self.config.dirpath,
            run=run,
        )
        self._is_saving = False
        silence_unused_hooks(self, "on_train_batch_end")

    @property
    @override
    def state_key(self) -> str:
        return f"nshtrainer.{self.config.identity}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.writer.settle(trainer, stage)
        self.writer.start_step = None
        if writers_of(trainer)[0] is self.writer:
            check_source(trainer)
        if stage == "fit":
            ResumeState.attach(trainer).notes_batches = True
            isolate(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_checking(trainer)
        self.writer.begin(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_checking(trainer)
        stop_isolating(trainer)
        ResumeState.detach(trainer)

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, and never called."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        if writers_of(trainer)[0] is not self.writer:
            return set()  # the first one answers for all, and reading the file takes time
        newest = newest_checkpoint(trainer)
        return set() if newest is None else {str(newest)}

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ResumeState.write(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ResumeState.read(trainer, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        untouched = self.writer.untouched_state
        return self.writer.state_dict() if untouched is None else untouched

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.writer.load_state_dict(state_dict)

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: MutableMapping[str, Any],
        weights_only: bool,
    ) -> None:
        """Make hyper-parameters plain data, as the other checkpoint callbacks do."""
        make_plain(checkpoint)
        if self._is_saving:
            drop_what_cannot_be_stored(checkpoint)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        stop_checking(trainer)
        try:
            self._save_once_more(trainer, exception)
        finally:
            leave_after_exception(self.writer, trainer)

    def _save_once_more(self, trainer: Trainer, exception: BaseException) -> None:
        start = self.writer.start_step
        if (
            trainer.state.fn != TrainerFn.FITTING
            or trainer.sanity_checking
            or trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set in Lightning's __init__
            or not trainer.is_global_zero
            or start is None
            or trainer.global_step <= start
        ):
            return
        if trainer.world_size > 1 and not _holds_everything(trainer):
            log.warning(
                "no checkpoint is saved on %s: with %s and what it shards one rank cannot save "
                "alone. Resume from the last one.",
                type(exception).__name__,
                type(trainer.strategy).__name__,
            )
            return
        name = type(exception).__name__
        try:
            abandon(trainer)  # what is being written may be the newest
            log.info("saved %s on %s", self._save(trainer), name)
        except Exception:
            log.exception(
                "no checkpoint could be saved on %s, which follows; older checkpoints are as they "
                "were",
                name,
            )

    def _save(self, trainer: Trainer) -> Place:
        writer = self.writer
        values: dict[str, float | str] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "id": writer.run_id or "",
        }
        stem, missing = self._template().render(values)
        if missing:
            log.warning("the file name asks for %s, which is not known here", missing)
        path = writer.folder / f"{stem}.ckpt"
        new = writer.new_record(trainer, path)
        old = writer.on_the_way()
        if any(r.path == path and not writer.may_remove(trainer, r) for r in writer.present()):
            # What was resumed from stays; so does what another attempt left.
            path = free_name(writer.folder, stem)
            new = writer.new_record(trainer, path)
        removed = [r for r in old if r.path != path and writer.may_remove(trainer, r)]
        self._is_saving = True
        try:
            with forgiving(trainer):
                writer.write_alone(trainer, writer.plan(new, removed=removed))
        finally:
            self._is_saving = False
        return path

    def _template(self) -> NameTemplate:
        if self.config.filename is not None:
            return NameTemplate.parse(self.config.filename)
        named = ("_", Key("id")) if self.writer.run_id else ()
        return NameTemplate(("on_exception", *named))


def _holds_everything(trainer: Trainer) -> bool:
    # What shards its state gathers it in a collective: ZeroRedundancyOptimizer, for one.
    shards = any(hasattr(optimizer, "consolidate_state_dict") for optimizer in trainer.optimizers)
    return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)) and not shards
