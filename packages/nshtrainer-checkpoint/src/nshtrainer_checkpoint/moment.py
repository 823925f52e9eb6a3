"""One moment, one dump: the checkpoint callbacks of a trainer decide together and share the file.

Lightning calls each of them in turn. The first one that listens to a moment acts for all: who wants
to save is asked, rank 0 plans for all of them in one broadcast, one state is dumped, and each plan
gets it under its own name by hard link or copy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, runtime_checkable
from weakref import WeakKeyDictionary, proxy

from lightning.pytorch.trainer.states import TrainerFn

from nshtrainer.errors import NshTrainerError

from .background import Background
from .metadata import plain_metrics
from .preemption import Preemption
from .ranks import agree
from .snapshot import Snapshot
from .streaming import StreamingCheckpointIO, can_stream, streaming
from .trial import check_writable, try_out
from .writer import (
    Committed,
    SavePlan,
    Writer,
    announce,
    commit_all,
    drop,
    next_save_number,
    wait_for_plugin,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "Moment",
    "Participant",
    "abandon",
    "happen",
    "is_training",
    "look_ahead",
    "participants_of",
    "settle",
]

log = logging.getLogger(__name__)

Moment = Literal[
    "step", "preemption", "validation_start", "validation_end", "epoch_end", "train_end"
]


@runtime_checkable
class Participant(Protocol):
    """A checkpoint callback that saves together with the others."""

    writer: Writer
    moments: frozenset[Moment]
    """Those it listens to."""
    async_save: bool
    on_save_error: Literal["raise", "warn"]
    trial: bool
    keeps: int
    """How many checkpoints it keeps."""
    preemption_signals: tuple[str, ...]
    """Those on which it saves."""
    commits_first: bool
    """Whether it keeps the newest: committed before others, `last.ckpt` is never behind them."""

    def wants(self, trainer: Trainer, moment: Moment) -> bool:
        """Whether it wants to save now; called on every rank, with the same answer."""
        ...

    def logged(self, trainer: Trainer, moment: Moment) -> dict[str, Any]:
        """The metrics that belong to the present weights; called on every rank."""
        ...

    def plan(
        self, trainer: Trainer, metrics: dict[str, float], save_number: int
    ) -> SavePlan | None:
        """What to write and delete, None for nothing; called on rank 0 only."""
        ...

    def decided(
        self, trainer: Trainer, moment: Moment, plan: SavePlan | None
    ) -> Callable[[], None]:
        """Take note of the plan on every rank; returns what undoes that."""
        ...


class _Session:
    """What the checkpoint callbacks of one trainer share."""

    def __init__(self) -> None:
        self.background = Background()
        self.snapshot = Snapshot()
        self.undo: list[Callable[[], None]] = []
        """Takes back what was decided for the save that is being written."""
        self.raises = True
        self.preemption: Preemption | None = None
        self.is_open = False
        """Whether a save may be under way in the background; the same on every rank."""


_sessions: WeakKeyDictionary[Trainer, _Session] = WeakKeyDictionary()


def _session_of(trainer: Trainer) -> _Session:
    """The session of *trainer*; made when it is first asked for."""
    return _sessions.setdefault(trainer, _Session())


def participants_of(trainer: Trainer) -> list[Participant]:
    """Our checkpoint callbacks that save at moments, in the trainer's order."""
    return [c for c in trainer.checkpoint_callbacks if _participates(c)]


def _participates(callback: object) -> TypeGuard[Participant]:
    """Whether *callback* is a `Participant`; asked at every step, and the check is a slow one."""
    kind = type(callback)
    if kind not in _kinds:
        _kinds[kind] = isinstance(callback, Participant)
    return _kinds[kind]


_kinds: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def happen(caller: Participant, trainer: Trainer, moment: Moment) -> None:
    """Save for all that want to, if *caller* is the first one that listens to *moment*.

    Raises:
        OSError: A checkpoint could not be written, and a callback that wanted it says `raise`.
        NshTrainerError: The same, on the other ranks.
    """
    if moment not in caller.moments:
        return
    listening = [p for p in participants_of(trainer) if moment in p.moments]
    if not listening or listening[0] is not caller or not is_training(trainer):
        return
    preemption = _session_of(trainer).preemption
    signal = None
    if moment == "preemption":
        signal = None if preemption is None else preemption.requested(trainer)
        if signal is None:
            return
    wanting = [p for p in listening if p.wants(trainer, moment)]
    if wanting:
        settle(trainer)  # one that is still being written counts when the next is decided on
        _save(trainer, wanting, moment)
    if signal is not None:
        settle(trainer)  # the machine may be gone in a moment
        log.info("%s was received; the checkpoint of step %s is saved", signal, trainer.global_step)
        if preemption is not None:
            preemption.pass_on(signal)


def is_training(trainer: Trainer) -> bool:
    """Whether this is a fit whose checkpoints count."""
    return (
        trainer.state.fn == TrainerFn.FITTING
        and not trainer.sanity_checking
        and not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set in Lightning's __init__
    )


def look_ahead(trainer: Trainer) -> None:
    """Find out before the first step whether saves will work; a collective, once per fit.

    Raises:
        ConfigError: A folder cannot be written to, or a trial shows that there is no room.
        NshTrainerError: The same, on the other ranks.
    """
    saving = participants_of(trainer)
    if not is_training(trainer):
        return
    signals = {name: None for p in saving for name in p.preemption_signals}
    session = _session_of(trainer)
    if signals and session.preemption is None:
        session.preemption = Preemption(signals)
        session.preemption.attach(trainer)
    for one in saving:
        with _failing([], raises=one.on_save_error == "raise"):
            agree(trainer, partial(check_writable, one.writer))
    trying = [p for p in saving if p.trial]
    if trying:
        first = min(trying, key=lambda p: p.writer.weights_only)
        with _failing([], raises=any(p.on_save_error == "raise" for p in trying)):
            try_out(trainer, first.writer, [p.keeps for p in trying])


def settle(trainer: Trainer) -> None:
    """Wait for the save in the background, on every rank, and hear how it ended.

    Raises:
        OSError: It failed, and a callback that wanted it says `raise`.
        NshTrainerError: The same, on the other ranks.
    """
    session = _session_of(trainer)
    if not session.is_open:
        return
    session.is_open = False
    undo, session.undo = session.undo, []
    with _failing(undo, raises=session.raises):
        agree(trainer, session.background.wait)


def abandon(trainer: Trainer) -> None:
    """Wait for the save in the background on this rank alone, and only log how it failed."""
    session = _session_of(trainer)
    if session.preemption is not None:
        session.preemption.detach()
        session.preemption = None
    try:
        session.background.close()
    except Exception:
        log.exception("a checkpoint could not be written; older ones are as they were")
        for take_back in session.undo:
            take_back()
    session.undo, session.is_open = [], False
    session.snapshot.forget()


def _save(trainer: Trainer, wanting: list[Participant], moment: Moment) -> None:
    logged = [p.logged(trainer, moment) for p in wanting]  # computing it may be a collective
    raises = any(p.on_save_error == "raise" for p in wanting)

    def decide() -> list[SavePlan | None]:
        number = next_save_number(trainer)
        return [
            p.plan(trainer, plain_metrics(values), number + index)
            for index, (p, values) in enumerate(zip(wanting, logged, strict=True))
        ]

    undo: list[Callable[[], None]] = []
    with _failing(undo, raises=raises):
        plans = agree(trainer, decide)
        undo += [p.decided(trainer, moment, plan) for p, plan in zip(wanting, plans, strict=True)]
        accepted = [(p, plan) for p, plan in zip(wanting, plans, strict=True) if plan is not None]
        for weights_only in (False, True):
            group = [(p, n) for p, n in accepted if n.record.weights_only == weights_only]
            if group:
                _dump(trainer, group, undo, raises=raises)


def _dump(
    trainer: Trainer,
    group: list[tuple[Participant, SavePlan]],
    undo: list[Callable[[], None]],
    *,
    raises: bool,
) -> None:
    session = _session_of(trainer)
    group = sorted(group, key=lambda pair: not pair[0].commits_first)
    plans = [plan for _, plan in group]
    pairs = [(p.writer, plan) for p, plan in group]
    in_background = any(p.async_save for p, _ in group) and can_stream(trainer)
    if in_background:
        settle(trainer)  # of a group before: there is one set of buffers
    try:
        with streaming(trainer, session.snapshot if in_background else None) as stream:
            trainer.save_checkpoint(plans[0].temporary, plans[0].record.weights_only)
        wait_for_plugin(trainer)
        if not in_background:
            _told(trainer, group, agree(trainer, partial(commit_all, trainer, pairs, stream)))
            return
    except BaseException:
        if trainer.is_global_zero:
            drop(plans)
        raise
    session.is_open, session.raises, session.undo = True, raises, list(undo)
    if trainer.is_global_zero:
        session.background.submit(partial(_finish, trainer, group, pairs, stream))


def _finish(
    trainer: Trainer,
    group: list[tuple[Participant, SavePlan]],
    pairs: list[tuple[Writer, SavePlan]],
    stream: StreamingCheckpointIO,
) -> None:
    """Write, commit and tell, in the background of rank 0."""
    try:
        committed = commit_all(trainer, pairs, stream)
    except BaseException:
        drop(plan for _, plan in group)
        raise
    _told(trainer, group, committed)


def _told(
    trainer: Trainer, group: list[tuple[Participant, SavePlan]], committed: list[Committed]
) -> None:
    announce(trainer, committed)
    if trainer.is_global_zero:
        for participant, _ in group:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(participant))


@contextlib.contextmanager
def _failing(undo: list[Callable[[], None]], *, raises: bool) -> Generator[None]:
    """Take back what was decided if the block fails; log the error instead, unless it *raises*."""
    try:
        yield
    except BaseException as error:
        for take_back in undo:
            take_back()
        if raises or not isinstance(error, (OSError, NshTrainerError)):
            raise
        log.error(  # noqa: TRY400 -- the cause is in the message, and no fault of the program
            "a checkpoint could not be written (%s: %s); training goes on, and older checkpoints "
            "are as they were",
            type(error).__name__,
            error,
        )
