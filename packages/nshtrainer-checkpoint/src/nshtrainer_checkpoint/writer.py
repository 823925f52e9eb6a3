"""`Writer`: one callback's folder of checkpoints within a run, and the way a save takes."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.runtime import driver, events
from nshtrainer.trainer.record import describe_run

from .lineage import Lineage
from .links import point, real_name
from .metadata import Record, SidecarReader, is_intact, json_number
from .places import LinkPolicy, Place, as_place
from .ranks import no_barrier
from .resume import ResumeState
from .retention import newest_first
from .retry import retrying
from .storage import (
    commit,
    discard,
    make_folder,
    recover,
    remove,
    share,
    temporary_for,
    whole_but_pending,
)
from .streaming import StreamingCheckpointIO, streaming

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from nshtrainer.run.run import Run

__all__ = [
    "Committed",
    "SavePlan",
    "Writer",
    "announce",
    "commit_all",
    "drop",
    "newest_checkpoint",
    "next_save_number",
    "wait_for_plugin",
    "writers_of",
]

log = logging.getLogger(__name__)


@dataclass
class SavePlan:
    """A save that rank 0 has decided on."""

    record: Record
    """The new checkpoint; size and digest are filled in by the commit."""
    temporary: Path
    removed: list[Record]
    link_to: Place | None
    metadata: dict[str, Any]
    kept: list[Record]
    """What counts afterwards, first one first."""


@dataclass
class Committed:
    """What became of a plan."""

    path: Place
    metadata: dict[str, Any]
    removed: list[Place]


class Writer:
    """Keeps the checkpoints of one callback in one folder.

    Args:
        identity: The callback's; sidecars carry it, and others' checkpoints are left alone.
        folder_name: Name of the folder.
        dirpath: Its parent, a path or a URL; None is the run's, or without a run the trainer's
            root directory.
        run: The run, where the callback comes from a configuration.
        link_name: Name of the link beside the folder; None makes none.
        links: How it is made.
        weights_only: What is saved.

    Raises:
        ConfigError: *dirpath* needs a library that is not installed, or is no place.
    """

    def __init__(
        self,
        *,
        identity: str,
        folder_name: str,
        dirpath: str | Path | None,
        run: Run | None,
        link_name: str | None = None,
        links: LinkPolicy = "symlink",
        weights_only: bool = False,
    ) -> None:
        self.identity, self.folder_name, self.link_name = identity, folder_name, link_name
        self.dirpath = None if dirpath is None else as_place(dirpath)
        self.links: LinkPolicy = links
        self.run, self.weights_only = run, weights_only
        self.sources: set[str] = set()
        """What this process has resumed from; never deleted."""
        self.lineage: Lineage | None = None
        self.start_step: int | None = None
        """Steps made before this fit; None before it starts."""
        self._loaded: dict[str, Any] = {}
        self._has_begun = True
        self._parent: Place | None = None
        self._reader = SidecarReader()
        self._started = time.monotonic()
        self._seconds_before = 0.0

    # ---- where ------------------------------------------------------------------------------

    def locate(self, trainer: Trainer | None = None) -> Place | None:
        """Return the folder; None while the run's id, or the trainer, is not known."""
        if self.dirpath is not None:
            parent = _absolute(self.dirpath)
        elif self.run is not None:
            known = self.run.known_directory
            parent = None if known is None else known.subdirectory("checkpoint")
        elif trainer is not None:
            parent = _absolute(as_place(trainer.default_root_dir)) / "checkpoint"
        else:
            parent = self._parent
        return None if parent is None else parent / self.folder_name

    @property
    def is_settled(self) -> bool:
        """Whether the folder has been agreed on."""
        return self._parent is not None

    @property
    def folder(self) -> Place:
        """The folder, agreed on in `settle`; it may not exist yet."""
        if self._parent is None:
            raise NshTrainerError(
                f"{self.identity} does not know its folder before `setup`; use it in or after that"
            )
        return self._parent / self.folder_name

    @property
    def link(self) -> Place | None:
        """The link beside the folder, if there is to be one."""
        if self.link_name is None or self.links == "none":
            return None
        return self.folder.parent / self.link_name

    def point_link(self, target: Place | None) -> None:
        """Make the link lead to *target*; None removes one that leads nowhere."""
        if self.link is not None:
            point(self.link, target, self.links)

    def move_link(self, target: Place | None) -> None:
        """Make the link lead to *target*, which has just been committed; None leaves it. Never raises."""
        if target is not None:
            try:
                self.point_link(target)
            except OSError as error:
                log.warning(
                    "the link %s could not be made to lead to %s: %s", self.link, target, error
                )

    @property
    def run_id(self) -> str | None:
        """The run's id, None outside of one."""
        return None if self.run is None else self.run.known_id

    def settle(self, trainer: Trainer, stage: str) -> None:
        """Agree on the folder over all ranks, in `setup`; in fit also clear up after dead writers.

        Raises:
            ConfigError: Two callbacks would write to one folder.
        """
        if self.run is not None:
            self.run.settle(trainer)
        folder = cast("Place", self.locate(trainer))
        self._parent = as_place(trainer.strategy.broadcast(str(folder.parent)))
        for other in writers_of(trainer):
            if other is not self and other._parent is not None and other.folder == self.folder:
                raise ConfigError(
                    f"{self.identity} and {other.identity} would both keep checkpoints in "
                    f"{self.folder}; give one of them a `label` or its own `dirpath`"
                )
        if stage == "fit":
            # Of an earlier fit; a checkpoint's state comes after `setup`.
            self._loaded, self._has_begun = {}, True
            driver.attach(trainer, self.identity).enable_saving(trainer)
            if trainer.is_global_zero:
                with contextlib.suppress(OSError):  # clearing up is no reason to fail
                    recover(self.folder, self.is_ours)

    # ---- what is there ----------------------------------------------------------------------

    def is_ours(self, record: Record) -> bool:
        """Whether this callback wrote it in this run."""
        return record.run_id == self.run_id and record.callback == self.identity

    def present(self, folder: Place | None = None) -> list[Record]:
        """Return this run's committed checkpoints of this callback, of all attempts."""
        return [r for r in self._reader.records(folder or self.folder) if self.is_ours(r)]

    def on_the_way(self) -> list[Record]:
        """Return those on the way of the present training; see `Lineage`."""
        lineage = self.lineage
        if lineage is None:
            return self.present()
        return [r for r in self.present() if lineage.includes(r.attempt, r.step)]

    def anyone(self, folder: Place) -> list[Record]:
        """Return what this callback committed in *folder*, in whatever run."""
        return [r for r in self._reader.records(folder) if r.callback == self.identity]

    def begin(self, trainer: Trainer) -> None:
        """Find out, when training starts, which checkpoints are on its way."""
        self._started = time.monotonic()
        self._has_begun = True
        self.start_step = trainer.global_step
        writers = writers_of(trainer)
        present = [(r.attempt, r.step) for w in writers if w._parent for r in w.present()]
        loaded = next((w._loaded for w in writers if w._loaded), None)
        if loaded is not None and loaded.get("run_id") == self.run_id:
            lineage = Lineage.from_state(loaded)
        else:
            # A second fit of this trainer goes on where it was.
            goes_on = loaded is None and trainer.ckpt_path is None and trainer.global_step > 0
            lineage = self.lineage if goes_on else None
        if lineage is None:
            self.lineage = Lineage.fresh(present)
            ahead = max((step for _, step in present), default=0)
            if present and trainer.global_step == 0:
                log.warning(
                    "training starts from scratch although this run has checkpoints up to step "
                    "%s; they are kept. Resume with ckpt_path='last', or start a new run.",
                    ahead,
                )
        else:
            self.lineage = lineage.resumed(trainer.global_step, present)

    # ---- state ------------------------------------------------------------------------------

    @property
    def train_seconds(self) -> float:
        """Time spent training in this and the resumed processes, by a clock that is never set."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def untouched_state(self) -> dict[str, Any] | None:
        """What was loaded, until training starts from it; to be saved again as it is."""
        return None if self._has_begun else dict(self._loaded)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        state = self.lineage.to_state() if self.lineage else {}
        return {**state, "run_id": self.run_id, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` made."""
        self._loaded, self._has_begun = dict(state), False
        with contextlib.suppress(TypeError, ValueError):
            self._seconds_before = float(state.get("train_seconds", 0.0))

    # ---- saving -----------------------------------------------------------------------------

    def new_record(
        self,
        trainer: Trainer,
        path: Place,
        value: float | None = None,
        save_number: int | None = None,
    ) -> Record:
        """Return the record of a checkpoint to be written now."""
        if save_number is None:
            save_number = next_save_number(trainer)
        return Record(
            path=path,
            run_id=self.run_id,
            callback=self.identity,
            attempt=self.lineage.attempt if self.lineage else 1,
            step=trainer.global_step,
            save_number=save_number,
            epoch=trainer.current_epoch,
            value=value,
            weights_only=self.weights_only,
        )

    def may_remove(self, trainer: Trainer, record: Record) -> bool:
        """Whether *record* may be deleted: our own, on our way, and not what was resumed from."""
        if record.path.parent != self.folder or not self.is_ours(record):
            return False
        sources = self.sources
        if trainer.ckpt_path is not None:
            sources = sources | {real_name(trainer.ckpt_path)}
        return real_name(record.path) not in sources

    def plan(
        self,
        record: Record,
        *,
        removed: Iterable[Record] = (),
        kept: Iterable[Record] = (),
        link_to: Place | None = None,
        metrics: dict[str, float] | None = None,
        monitor: dict[str, Any] | None = None,
    ) -> SavePlan:
        """Return the plan to write *record*, with the content of its sidecar; rank 0 only."""
        metadata = {
            "run_id": record.run_id,
            "callback": record.callback,
            "attempt": record.attempt,
            "save_number": record.save_number,
            "epoch": record.epoch,
            "global_step": record.step,
            "save_weights_only": record.weights_only,
            "monitor": monitor and {**monitor, "value": json_number(record.value)},
            "metrics": {name: json_number(v) for name, v in (metrics or {}).items()},
            "training_time_s": round(self.train_seconds, 3),
            "checkpoint_timestamp": dt.datetime.now(dt.timezone.utc).isoformat(),
        }
        self.ensure_folder()
        return SavePlan(
            record, temporary_for(record.path), list(removed), link_to, metadata, list(kept)
        )

    def ensure_folder(self) -> Place:
        """Make the folder, and what the run keeps beside it; rank 0 only."""
        if self.dirpath is None and self.run is not None:
            self.run.directory.ensure("checkpoint")
        make_folder(self.folder)
        return self.folder

    def write_alone(self, trainer: Trainer, plan: SavePlan) -> Committed:
        """Save and commit *plan* on this rank (zero) without waiting for any other, and tell of it.

        Raises:
            OSError: The checkpoint could not be written; older ones are as they were.
        """
        try:
            with streaming(trainer) as stream, no_barrier(trainer), ResumeState.alone(trainer):
                trainer.save_checkpoint(plan.temporary, self.weights_only)
            wait_for_plugin(trainer)
            committed = commit_all(trainer, [(self, plan)], stream)
        except BaseException:
            drop([plan])
            raise
        announce(trainer, committed)
        return committed[0]


def commit_all(
    trainer: Trainer, plans: list[tuple[Writer, SavePlan]], stream: StreamingCheckpointIO
) -> list[Committed]:
    """Commit one dump under the names of all *plans*, point their links, delete what fell out.

    Args:
        trainer: What is saved; only asked what the sidecars say of the run.
        plans: Each with its writer; the dump lies, or will lie, at the first one's temporary path.
        stream: What wrote the dump, or holds it.

    Raises:
        OSError: Something could not be written; older checkpoints are as they were.
    """
    known = stream.finish()
    about = {"weights_finite": stream.weights_finite, **describe_run(trainer)}
    first = plans[0][1]
    if stream.weights_finite is False:
        log.warning(
            "the weights at step %s, which are being saved, hold NaN or infinity; a resumed run "
            "starts from an earlier checkpoint, if one is kept (`topk`)",
            first.record.step,
        )
    for _, plan in plans[1:]:
        retrying(lambda plan=plan: share(first.temporary, plan.temporary), plan.temporary.parent)
    done: list[Committed] = []
    for writer, plan in plans:
        metadata = retrying(
            lambda writer=writer, plan=plan: commit(
                plan.temporary,
                plan.record.path,
                {**plan.metadata, **about},
                known,
                then=lambda: writer.move_link(plan.link_to),
            ),
            plan.record.path,
        )
        done.append(Committed(plan.record.path, metadata, []))
    for (_, plan), committed in zip(plans, done, strict=True):
        committed.removed = [r.path for r in plan.removed if remove(r)]
    return done


def drop(plans: Iterable[SavePlan]) -> None:
    """Delete the temporary files of *plans* that came to nothing."""
    for plan in plans:
        with contextlib.suppress(OSError):
            discard(plan.temporary)


def announce(trainer: Trainer, committed: Iterable[Committed]) -> None:
    """Tell the other callbacks of checkpoints that were committed and deleted."""
    for one in committed:
        log.debug("saved %s", one.path)
        events.emit(trainer, events.ON_CHECKPOINT_SAVED, one.path, one.metadata)
        for path in one.removed:
            events.emit(trainer, events.ON_CHECKPOINT_REMOVED, path)


def next_save_number(trainer: Trainer) -> int:
    """Return the number after that of the newest checkpoint of the run, whoever wrote it."""
    everywhere = [r for w in writers_of(trainer) if w.is_settled for r in w.present()]
    return 1 + max((r.save_number for r in everywhere), default=0)


def writers_of(trainer: Trainer) -> list[Writer]:
    """Return the writers of all our checkpoint callbacks of *trainer*."""
    callbacks: list[Any] = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]  # pyright: ignore[reportUnnecessaryIsInstance] -- Lightning's list is not typed at run time
    found = (getattr(c, "writer", None) for c in callbacks)
    return [w for w in found if isinstance(w, Writer)]


def newest_checkpoint(trainer: Trainer) -> Place | None:
    """Return the newest checkpoint of the run that can be resumed from, whoever wrote it.

    The newest is that of the latest attempt with the greatest step; a damaged one is passed over
    with a warning. With an explicit `dirpath` that holds none of this run, those of earlier runs
    count. Reads the whole file; no rank waits for another one.
    """
    records: list[Record] = []
    others: list[Record] = []
    for writer in writers_of(trainer):
        folder = writer.locate(trainer)
        if folder is not None:
            records += writer.present(folder)
            # Written whole by a process that was killed on the last metre: `settle` commits it.
            records += [r for r in whole_but_pending(folder) if writer.is_ours(r)]
            others += writer.anyone(folder) if writer.dirpath is not None else []
    for record in newest_first(r for r in records or others if not r.weights_only):
        if not is_intact(record):
            log.warning(
                "%s is damaged: size or SHA-256 differ from its metadata. The checkpoint before it "
                "is used; delete the damaged one.",
                record.path,
            )
        elif not record.weights_finite:
            log.warning(
                "%s holds weights that are NaN or infinite, from which no training recovers. The "
                "checkpoint before it is used; give its path to use it all the same.",
                record.path,
            )
        else:
            return record.path
    return None


def _absolute(place: Place) -> Place:
    return place.expanduser().absolute() if isinstance(place, Path) else place


def wait_for_plugin(trainer: Trainer) -> None:
    """Wait until a plugin of the user's that saves in the background has written the file."""
    checkpoint_io = trainer.strategy.checkpoint_io
    if isinstance(checkpoint_io, AsyncCheckpointIO):
        checkpoint_io.teardown()  # waits for the thread and raises its error; the next save makes a new one
