"""Where in the epoch's data training is, and how to get there again.

The random state from just before an iterator is made decides the shuffled order and the workers'
seeds. With that state put back, an iterator like it is made, and as many batches as were consumed
are read and dropped. Some numbers are drawn later, in this process: by a sampler at its first
batch, by a shorter loader that starts over, by a stream that shuffles as it goes. For those the
states from before such fetches are kept too.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.types import _Stateful  # pyright: ignore[reportPrivateUsage] -- Lightning's own test of a loader that resumes itself
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher  # pyright: ignore[reportPrivateUsage] -- no public name
from torch.utils.data import DataLoader, IterableDataset

from . import rng

__all__ = ["DataPosition", "describe", "resumes_itself"]

log = logging.getLogger(__name__)

_MOST_FETCHES = 256
"""Random states kept for a stream that draws in this process; each takes 10 KB."""


class DataPosition:
    """Remembers how the iterator of the present epoch came about.

    Fetches count from 0, the first one after the iterator was made.
    """

    def __init__(self) -> None:
        self.before_iterator: dict[str, Any] | None = None
        self._before_fetch: dict[int, dict[str, Any]] = {}
        self._fetches = 0
        self._is_open = False
        self._is_exact = True
        """Whether every state that a replay needs was kept."""
        self._read: dict[str, Any] | None = None
        self._iterators: list[int] = []

    def close(self) -> None:
        """Watch no fetch until `begin`."""
        self._is_open = False

    def begin(self, before_iterator: dict[str, Any] | None) -> None:
        """Watch the fetches of an iterator, if it is a new one made at *before_iterator*."""
        if before_iterator is not None:
            self.before_iterator = before_iterator
            self._before_fetch, self._fetches, self._is_exact = {}, 0, True
        self._is_open = True

    def before_fetch(self, fetcher: Any) -> None:
        """Keep the random state, where this fetch may draw in this process."""
        if not self._is_open:
            return
        loaders = fetcher.combined_loader.flattened
        self._read = None
        if self._fetches == 0 or len(loaders) > 1 or _draws_late(fetcher):
            self._read = rng.read(rng.generators_of(loaders))
            self._iterators = _iterators(fetcher)

    def after_fetch(self, fetcher: Any) -> None:
        """Drop what was kept in vain."""
        if not self._is_open:
            return
        number, self._fetches = self._fetches, self._fetches + 1
        if self._read is None:
            return
        started_over = _iterators(fetcher) != self._iterators
        drew = not rng.same(
            self._read, rng.read(rng.generators_of(fetcher.combined_loader.flattened))
        )
        if drew and (number == 0 or started_over or len(self._before_fetch) < _MOST_FETCHES):
            self._before_fetch[number] = self._read
        elif drew:
            self._is_exact = False
            if fetcher.length is None:  # the batch that waits to be used comes from this fetch
                self._before_fetch.pop(number - 1, None)
                self._before_fetch[number] = self._read
        self._read = None

    def to_state(self) -> dict[str, Any] | None:
        """Return plain data, None before there is an iterator."""
        if self.before_iterator is None:
            return None
        return {
            "before_iterator": self.before_iterator,
            "before_fetch": dict(self._before_fetch),
            "is_exact": self._is_exact,
        }

    def replay(self, fetcher: Any, state: dict[str, Any], consumed: int) -> bool:
        """Make the iterator that *state* remembers and drop *consumed* batches.

        Returns:
            Whether there were that many.
        """
        generators = rng.generators_of(fetcher.combined_loader.flattened)
        self.close()
        rng.put_back(state["before_iterator"], generators)
        iter(fetcher)
        for number in range(consumed):
            if number in state["before_fetch"]:
                rng.put_back(state["before_fetch"][number], generators)
            try:
                next(fetcher)
            except StopIteration:
                return False
        self.begin(state["before_iterator"])
        self._before_fetch, self._fetches = dict(state["before_fetch"]), consumed
        self._is_exact = bool(state["is_exact"])
        if not self._is_exact:
            log.warning(
                "the training data is a stream that draws random numbers in this process in more "
                "than %s fetches; its order after this resume may differ from an uninterrupted "
                "run's. Give the stream a generator of its own, or num_workers=1.",
                _MOST_FETCHES,
            )
        return True


def resumes_itself(combined_loader: Any) -> bool:
    """Whether a loader has `state_dict` and `load_state_dict`; Lightning then restores it."""
    return any(isinstance(loader, _Stateful) for loader in combined_loader.flattened)


def can_replay(fetcher: Any) -> bool:
    """Whether batches are fetched one for each step; not with `training_step(dataloader_iter)`."""
    return not isinstance(fetcher, _DataLoaderIterDataFetcher)


def describe(loaders: list[Any]) -> list[dict[str, Any]]:
    """Return what must be the same for the k-th batch of *loaders* to be the same."""
    return [
        {
            "kind": type(loader).__name__,
            "batches": sized_len(loader),
            "batch_size": getattr(loader, "batch_size", None),
            "samples": sized_len(getattr(loader, "dataset", None)),
            "num_workers": getattr(loader, "num_workers", None),
        }
        for loader in loaders
    ]


def differences(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Return what differs between two of `describe`, as text; empty if nothing does."""
    if len(before) != len(now):
        return f"{len(before)} loaders then, {len(now)} now"
    return ", ".join(
        f"{key} {old[key]} then, {new[key]} now"
        for old, new in zip(before, now, strict=True)
        for key in old
        if key in new and old[key] != new[key]
    )


def keeps_workers(loaders: list[Any]) -> bool:
    """Whether workers live on from epoch to epoch, and with them their random states."""
    return any(
        getattr(x, "persistent_workers", False) and getattr(x, "num_workers", 0) for x in loaders
    )


def _draws_late(fetcher: Any) -> bool:
    """Whether a fetch after the first may draw numbers in this process that shape the order."""
    return any(
        not isinstance(loader, DataLoader)
        or (loader.num_workers == 0 and isinstance(loader.dataset, IterableDataset))  # pyright: ignore[reportUnknownMemberType] -- of an unknown element type
        for loader in fetcher.combined_loader.flattened
    )


def _iterators(fetcher: Any) -> list[int]:
    """Which iterators are in use; another one where a shorter loader started over."""
    inner = getattr(fetcher.combined_loader, "_iterator", None)
    return [id(iterator) for iterator in getattr(inner, "iterators", ())]
