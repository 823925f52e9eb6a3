"""What Lightning knows of checkpoint callbacks: one `ModelCheckpoint` whose every hook is ours."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from nshtrainer.callbacks.callback import silence_unused_hooks
from nshtrainer.errors import ConfigError

from .config import BestCheckpointCallbackConfig, LastCheckpointCallbackConfig
from .metadata import Record, SidecarReader
from .moment import Moment, abandon, happen, look_ahead, participants_of, settle
from .names import NameTemplate, duration_text
from .places import Place, as_place
from .plain import foreign_values, make_plain
from .resume import ResumeState
from .retention import Keep, decide
from .source import check_source, leave_after_exception, stop_checking
from .storage import free_name
from .writer import SavePlan, Writer, newest_checkpoint, writers_of

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from lightning.pytorch import LightningModule, Trainer

    from nshtrainer.metric import MetricConfig

__all__ = ["CheckpointCallback"]

log = logging.getLogger(__name__)

_SIGNALS = ("SIGTERM", "SIGUSR1")


class CheckpointCallback(ModelCheckpoint):
    """What best and last have in common: when they act, and how a save goes.

    A `ModelCheckpoint`, since Lightning's `ckpt_path="last"` and loggers ask for one, but none of
    its hooks is used.
    """

    finds_newest_checkpoint = True
    """`nshtrainer.Trainer` takes `ckpt_path="auto"` where a callback says so."""

    announces_checkpoints = True
    """Each save is told by `on_checkpoint_saved`, too."""

    def __init__(
        self,
        config: BestCheckpointCallbackConfig | LastCheckpointCallbackConfig,
        writer: Writer,
        template: NameTemplate,
        keep: Keep,
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
        self._policy = config
        self._keep = keep
        signals = getattr(config, "preemption_signals", ())
        self.preemption_signals: tuple[str, ...] = _SIGNALS if signals is None else tuple(signals)
        self.moments = self._listens_to()
        self.async_save = bool(config.async_save)
        self.on_save_error: Literal["raise", "warn"] = config.on_save_error or "raise"
        self.trial = bool(config.trial)
        self.keeps = keep.topk or 1
        self.commits_first = keep.order == "newest"
        self._seen_step = 0
        self._last_moment: Moment | None = None
        self._warned: set[str] = set()
        self._checked_content = False
        self._loaded_paths: list[Place] = []
        silence_unused_hooks(self, "on_train_batch_end")
        if self.moments.isdisjoint(("step", "preemption")):
            self.__dict__["on_train_batch_settled"] = None

    # ---- what differs -----------------------------------------------------------------------

    @abstractmethod
    def _value(self, metrics: dict[str, float]) -> float | None:
        """The value to rank by."""

    @abstractmethod
    def _competitors(self) -> list[Record]:
        """What a new checkpoint is compared with."""

    def _listens_to(self) -> frozenset[Moment]:
        """The moments at which it may want to save."""
        config = self._policy
        moments: set[Moment] = {"validation_end", "epoch_end"}
        if config.every_n_steps is not None:
            moments.add("step")
        return frozenset(moments)

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
        if writers_of(trainer)[0] is self.writer:
            check_source(trainer)
        if stage == "fit":
            ResumeState.attach(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_checking(trainer)
        self._last_time_checked = time.monotonic()
        self._seen_step = trainer.global_step
        if trainer.global_step == 0:
            self._last_global_step_saved, self._last_moment = 0, None  # of an earlier fit
        self.writer.begin(trainer)
        if self is participants_of(trainer)[0]:
            look_ahead(trainer)
        if trainer.is_global_zero:
            ranked = self._keep.rank(self._competitors())
            self._show(ranked)
            own = [r.path for r in ranked if r.path.parent == self.writer.folder]
            self.writer.point_link(own[0] if own else None)  # a killed process left it behind

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, and never called: the module's own hook comes after it."""

    def on_train_batch_settled(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when all hooks of a batch have run, the module's own too."""
        # Between optimizer steps there are gradients that no checkpoint would hold.
        if trainer.global_step != self._seen_step:
            happen(self, trainer, "step")
            happen(self, trainer, "preemption")
            self._seen_step = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        happen(self, trainer, "epoch_end")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        happen(self, trainer, "validation_start")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the module's own hook comes after it."""

    def on_validation_settled(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when all hooks at the end of a validation have run, the module's own too."""
        happen(self, trainer, "validation_end")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Only waits for what is being written: a collective save could wait for a rank that has gone."""
        stop_checking(trainer)
        abandon(trainer)
        leave_after_exception(self.writer, trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        happen(self, trainer, "train_end")
        if participants_of(trainer)[-1] is self:
            settle(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_checking(trainer)
        ResumeState.detach(trainer)
        abandon(trainer)

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
            "last_moment": self._last_moment,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.writer.load_state_dict(state_dict)
        self._last_global_step_saved = int(state_dict.get("last_saved_step", 0))
        self._last_moment = state_dict.get("last_moment")
        same = (state_dict.get("monitor"), state_dict.get("mode")) == (self.monitor, self.mode)
        self._loaded_paths = []
        for path in state_dict.get("kept", ()) if same else ():
            with contextlib.suppress(ConfigError):  # in a store that cannot be reached from here
                self._loaded_paths.append(as_place(path))

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
            ranked = self._keep.rank(self.writer.present(folder)) if folder is not None else []
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

    def logged(self, trainer: Trainer, moment: Moment) -> dict[str, Any]:
        """The metrics known now."""
        return dict(trainer.callback_metrics)

    def wants(self, trainer: Trainer, moment: Moment) -> bool:
        """Whether to save now; the same on every rank."""
        config = self._policy
        if moment == "step":
            return self._is_step_due(trainer) and self._is_new(trainer, moment)
        if moment == "validation_end":
            return config.on_validation_end and self._is_new(trainer, moment)
        if moment == "epoch_end":
            n = config.every_n_epochs
            is_due = (config.on_validation_end and not _validates(trainer)) or (
                n is not None and (trainer.current_epoch + 1) % n == 0
            )
            return is_due and self._is_new(trainer, moment)
        return self._is_new(trainer, moment)

    def _is_step_due(self, trainer: Trainer) -> bool:
        """Whether this is a step after which to save."""
        return self._passes(trainer, self._policy.every_n_steps)

    def _passes(self, trainer: Trainer, n: int | None) -> bool:
        """Whether a multiple of *n* was reached; several optimizers count up by more than one."""
        return n is not None and trainer.global_step // n > self._seen_step // n

    def _is_new(self, trainer: Trainer, moment: Moment) -> bool:
        """Whether there is something to save since the last time: a step, or a validation after it."""
        if trainer.global_step != self._last_global_step_saved:
            return True
        before_validation = self._last_moment in ("step", "preemption", "validation_start")
        return moment == "validation_end" and before_validation

    def decided(
        self, trainer: Trainer, moment: Moment, plan: SavePlan | None
    ) -> Callable[[], None]:
        """Take note of what will be written, before it is: the file's own state counts it."""
        names = (
            "best_k_models", "_best_model_path", "best_model_score", "last_model_path",
            "kth_best_model_path", "kth_value", "current_score", "_last_checkpoint_saved",
            "_last_global_step_saved", "_last_moment",
        )  # fmt: skip
        before = {name: getattr(self, name) for name in names}
        self._last_time_checked = time.monotonic()
        self._last_global_step_saved, self._last_moment = trainer.global_step, moment
        if plan is not None:
            self._show(plan.kept)
            self.last_model_path = self._last_checkpoint_saved = str(plan.record.path)
            self.current_score = _tensor(plan.record.value)
        return lambda: self.__dict__.update(before)

    def plan(
        self, trainer: Trainer, metrics: dict[str, float], save_number: int
    ) -> SavePlan | None:
        """What to write and delete; rank 0 only."""
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
        new = writer.new_record(
            trainer, free_name(writer.folder, stem), self._value(metrics), save_number
        )
        decision = decide(
            self._competitors(),
            self._keep,
            new=new,
            may_remove=lambda record: writer.may_remove(trainer, record),
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
        found = [present[p] for p in paths if p in present]
        # A run that was copied as a whole has its own of each.
        own = {(r.run_id, r.attempt, r.save_number) for r in self.writer.present()}
        return [r for r in found if (r.run_id, r.attempt, r.save_number) not in own]

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
