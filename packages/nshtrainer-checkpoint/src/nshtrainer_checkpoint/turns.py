"""Which rank saves when training has failed, settled with no collective: some ranks may be gone."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from nshtrainer.runtime import events
from nshtrainer.runtime.saving import PREPARED_KEY

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Turn", "saving_here"]

log = logging.getLogger(__name__)

_GRACE = 2.0
"""Seconds that the others give rank 0, for an exception that all of them share."""

_PATIENCE = 600.0
"""Seconds to wait for the rank that saves."""

_numbers = itertools.count()
"""Of what this process has trained; rank 0's count."""


class Turn:
    """Who saves in one fit; made on every rank when training starts, which is a collective.

    Rank 0, if it comes within 2 s. Else the first that comes: rank 0 may hang in a collective that
    no one will join, or be dead. The ranks exchange notes in the process group's store, which lives
    in rank 0 (in torchrun's agent, under torchrun): when it does not answer, rank 0 is gone, and
    rank 1 saves. The others wait until that is done, since the first process to exit takes the rest
    with it: Lightning's launcher kills them within 5 s.
    """

    def __init__(self, trainer: Trainer) -> None:
        number = trainer.strategy.broadcast(next(_numbers))
        self._key = f"nshtrainer/exception/{number}"

    @contextlib.contextmanager
    def taken(self, trainer: Trainer) -> Generator[bool]:
        """Yield whether this rank is to save, when the others have had their chance."""
        if trainer.world_size == 1:
            yield True
            return
        store = _store()
        if not self._is_mine(trainer, store):
            yield False
            return
        try:
            with _others_stay():
                yield True
        finally:
            with contextlib.suppress(RuntimeError):
                if store is not None:
                    store.set(f"{self._key}/done", "1")

    def _is_mine(self, trainer: Trainer, store: Any) -> bool:
        if store is None:
            return trainer.is_global_zero
        rank = trainer.global_rank
        is_near = trainer.node_rank == 0  # another machine's disk is of no use to who resumes
        try:
            if rank > 0 and not _wait(store, self._key, _GRACE) and not is_near:
                return False
            saver = store.compare_set(self._key, "", str(rank)).decode()
            if saver == str(rank):
                return True
            if not _wait(store, f"{self._key}/done", _PATIENCE):
                log.warning("rank %s has not saved within %s s", saver, _PATIENCE)
        except RuntimeError as error:
            log.debug("the store does not answer (%s)", error)
            lives_in_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            return is_near and rank == (0 if lives_in_agent else 1)
        return False


def _wait(store: Any, key: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def saving_here(trainer: Trainer) -> Generator[None]:
    """Let `trainer.save_checkpoint` write on this rank, where Lightning would on rank 0 only."""
    if trainer.is_global_zero:
        yield
        return
    strategy: Any = trainer.strategy
    held = cast("dict[str, Any]", vars(strategy))
    before = held.get("save_checkpoint")

    def save(checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        events.emit(trainer, events.ON_CHECKPOINT_PREPARE, checkpoint, False)
        checkpoint[PREPARED_KEY] = True
        strategy.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    held["save_checkpoint"] = save
    try:
        yield
    finally:
        if before is None:
            del held["save_checkpoint"]
        else:
            held["save_checkpoint"] = before


def _store() -> Any:
    if not dist.is_available() or not dist.is_initialized():
        return None
    return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] -- torch offers no public way to the store


@contextlib.contextmanager
def _others_stay() -> Generator[None]:
    """Hold back the thread with which Lightning's launcher kills this process once another died."""
    watching = [t for t in threading.enumerate() if type(t).__name__ == "_ChildProcessObserver"]
    for thread in watching:
        vars(thread)["_run"] = _not_yet
    try:
        yield
    finally:
        for thread in watching:
            vars(thread).pop("_run", None)


def _not_yet() -> bool:
    return False
