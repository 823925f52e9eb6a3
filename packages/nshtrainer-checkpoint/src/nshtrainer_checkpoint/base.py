"""What Lightning knows of checkpoint callbacks: one `ModelCheckpoint` whose every hook is ours."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from nshtrainer.callbacks.callback import silence_unused_hooks

from .config import BestCheckpointCallbackConfig, LastCheckpointCallbackConfig
from .metadata import Record, SidecarReader, plain_metrics, sidecar_of
from .names import NameTemplate, duration_text
from .plain import foreign_values, make_plain
from .retention import retain
from .storage import free_name, point_link
from .writer import SavePlan, Writer, agree, newest_checkpoint

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from lightning.pytorch import LightningModule, Trainer

    from nshtrainer.metric import MetricConfig

__all__ = ["CheckpointCallback"]

log = logging.getLogger(__name__)


class CheckpointCallback(ModelCheckpoint):
    """What best and last have in common: when they act, and how a save goes.

    A `ModelCheckpoint`, since Lightning's `ckpt_path="last"` and loggers ask for one, but none of
    its hooks is used.
    """

    def __init__(
        self,
        config: BestCheckpointCallbackConfig | LastCheckpointCallbackConfig,
        writer: Writer,
        template: NameTemplate,
        metric: MetricConfig | None = None,
    ) -> None:
        self._best_model_path = ""
        super().__init__(
            monitor=None if metric is None else metric.name,
            mode="min" if metric is None else metric.mode,
            save_weights_only=config.save_weights_only,
            auto_insert_metric_name=False,
        )
        self.writer, self._template = writer, template
        self._identity = config.identity
        self.save_top_k = -1 if config.topk == "all" else config.topk
        self._topk = None if config.topk == "all" else config.topk
        self._warned: set[str] = set()
        self._checked_content = False
        self._loaded_paths: list[Path] = []
        silence_unused_hooks(self)

    # ---- what differs -----------------------------------------------------------------------

    @abstractmethod
    def _value(self, metrics: dict[str, float]) -> float | None:
        """The value to rank by."""

    @abstractmethod
    def _competitors(self) -> list[Record]:
        """What a new checkpoint is compared with."""

    @abstractmethod
    def _rank(self, records: list[Record]) -> list[Record]:
        """Sort, the most worth keeping first."""

    # ---- Lightning's hooks, all of them -------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return f"nshtrainer.{self._identity}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.writer.settle(trainer, stage)
        self.dirpath = str(self.writer.folder)
        self._checked_content = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_time_checked = time.monotonic()
        if trainer.global_step == 0:
            self._last_global_step_saved = 0  # of an earlier fit
        self.writer.begin(trainer)
        if trainer.is_global_zero:
            ranked = self._rank(self._competitors())
            self._show(ranked)
            if self.writer.link is not None:  # a process killed after its commit left it behind
                own = [r.path for r in ranked if r.path.parent == self.writer.folder]
                point_link(self.writer.link, own[0] if own else None)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing here; `LastCheckpointCallback` looks at its interval."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _validates(trainer):
            self._save_if_due(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_due(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Nothing: a collective save could wait for a rank that has gone."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing here; `LastCheckpointCallback` saves steps made since its last save."""

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain data; what to do comes from the configuration, never from a checkpoint."""
        if (untouched := self.writer.untouched_state) is not None:
            return untouched
        score = self.best_model_score
        return {
            **self.writer.state_dict(),
            "monitor": self.monitor,
            "mode": self.mode,
            "best_model_path": str(self.best_model_path),
            "best_model_score": None if score is None else float(score),
            "kept": [str(path) for path in self.best_k_models],
            "last_model_path": str(self.last_model_path),
            "last_saved_step": self._last_global_step_saved,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.writer.load_state_dict(state_dict)
        self._last_global_step_saved = int(state_dict.get("last_saved_step", 0))
        same = (state_dict.get("monitor"), state_dict.get("mode")) == (self.monitor, self.mode)
        self._loaded_paths = [Path(p) for p in state_dict.get("kept", ())] if same else []

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: MutableMapping[str, Any],
        weights_only: bool,
    ) -> None:
        """Make hyper-parameters plain data; warn once of what else torch will refuse to read."""
        make_plain(checkpoint)
        if not self._checked_content and trainer.is_global_zero:
            self._checked_content = True
            for place, kind in foreign_values(dict(checkpoint)):
                self._warn_once(
                    "content",
                    f"{place} is a {kind.__module__}.{kind.__qualname__}, so the checkpoint cannot "
                    f"be read with torch.load(weights_only=True), nor be resumed from. Store plain "
                    f"data (numbers, text, tensors, lists, mappings) in its place.",
                )
                break

    # ---- what Lightning and loggers ask for ---------------------------------------------------

    @property
    @override
    def best_model_path(self) -> str:
        """The checkpoint that ranks first; in a new process it is looked up on disk."""
        if not self._best_model_path:
            folder = self.writer.locate()
            ranked = self._rank(self.writer.present(folder)) if folder is not None else []
            return str(ranked[0].path) if ranked else ""
        return self._best_model_path

    @best_model_path.setter
    def best_model_path(self, value: str) -> None:
        self._best_model_path = value

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        newest = newest_checkpoint(trainer)
        return set() if newest is None else {str(newest)}

    # ---- saving -------------------------------------------------------------------------------

    def _logged(self, trainer: Trainer) -> dict[str, Any]:
        return dict(trainer.callback_metrics)

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether there was a training step since the last decision; the same on every rank."""
        return (
            trainer.state.fn == TrainerFn.FITTING
            and not trainer.sanity_checking
            and not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set in Lightning's __init__
            and trainer.global_step != self._last_global_step_saved
        )

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = self._logged(trainer)  # on every rank: computing it may be a collective
        plan = agree(trainer, lambda: self._plan(trainer, plain_metrics(logged)))
        self._last_time_checked = time.monotonic()
        before = self._last_global_step_saved
        self._last_global_step_saved = trainer.global_step
        if plan is None:
            return
        shown = (
            self.best_k_models,
            self._best_model_path,
            self.best_model_score,
            self.last_model_path,
        )
        self._show(plan.kept)  # before the save: the checkpoint's own state counts it
        self.last_model_path = str(plan.record.path)
        self.current_score = _tensor(plan.record.value)
        try:
            self.writer.write(trainer, pl_module, plan)
        except BaseException:
            self._last_global_step_saved = before
            (
                self.best_k_models,
                self._best_model_path,
                self.best_model_score,
                self.last_model_path,
            ) = shown
            raise
        self._last_checkpoint_saved = self.last_model_path
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _plan(self, trainer: Trainer, metrics: dict[str, float]) -> SavePlan | None:
        writer = self.writer
        values = {
            **metrics,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "train_duration": duration_text(writer.train_seconds),
        }
        stem, missing = self._template.render(values)
        for key in missing:
            if key != self.monitor:
                self._warn_once(
                    key,
                    f"the file name asks for {key!r}, which was not logged or has another format; "
                    f"it reads 'none'. Known now: {', '.join(sorted(values))}.",
                )
        new = writer.new_record(trainer, free_name(writer.folder, stem), self._value(metrics))
        decision = retain(
            self._rank([*self._competitors(), new]),
            new,
            self._topk,
            lambda record: writer.may_remove(trainer, record),
        )
        if not decision.saves:
            log.debug("%s: step %s is not kept", writer.identity, new.step)
            return None
        own = [r.path for r in decision.kept if r.path.parent == writer.folder]
        monitor = None if self.monitor is None else {"name": self.monitor, "mode": self.mode}
        return writer.plan(
            new,
            removed=decision.removed,
            kept=decision.kept,
            link_to=own[0] if own else None,
            metrics=metrics,
            monitor=monitor,
        )

    def _inherited(self) -> list[Record]:
        """What the resumed run kept in another folder, if it is still there; never deleted here."""
        reader = SidecarReader()
        paths = [p for p in self._loaded_paths if p.parent != self.writer.folder]
        present = {
            r.path: r for folder in {p.parent for p in paths} for r in reader.records(folder)
        }
        return [present[p] for p in paths if p in present and sidecar_of(p).exists()]

    def _show(self, ranked: list[Record]) -> None:
        """Set what Lightning, its loggers and the user read."""
        self.best_k_models = {str(r.path): _tensor(r.value) for r in ranked}
        self._best_model_path = str(ranked[0].path) if ranked else ""
        self.best_model_score = _tensor(ranked[0].value) if ranked else None
        self.kth_best_model_path = str(ranked[-1].path) if ranked else ""
        if ranked:
            self.kth_value = _tensor(ranked[-1].value)

    def _warn_once(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            log.warning("%s: %s", self.writer.identity, message)


def _validates(trainer: Trainer) -> bool:
    """Whether this fit has validation at all; without any, the end of an epoch is the moment."""
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0


def _tensor(value: float | None) -> torch.Tensor:
    return torch.tensor(float("nan") if value is None else value)
