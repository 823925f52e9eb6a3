"""How many batches a training epoch has, also where the data does not say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["EpochLength"]


class EpochLength:
    """The length of an epoch: what Lightning knows, or what the last whole epoch had.

    Args:
        learned: What an earlier process has learned.
    """

    def __init__(self, learned: int | None = None) -> None:
        self.learned = learned
        """Batches of the last whole epoch; None before there was one."""
        self._from_its_start = False

    def of(self, trainer: Trainer) -> float:
        """Return the batches of one epoch; `inf` where that is not known yet.

        `limit_train_batches` may say more than a stream holds, so that what was seen counts.
        """
        return min(trainer.num_training_batches, self.learned or math.inf)

    def start(self) -> None:
        """Note that an epoch begins; at `on_train_epoch_start`.

        An epoch that is resumed in the middle has no such hook, and nothing is learned from it: a
        stream that cannot be resumed begins anew, and the count of batches goes on.
        """
        self._from_its_start = True

    def learn(self, trainer: Trainer) -> bool:
        """Note the length of the present epoch if it is complete; at `on_train_epoch_end`.

        Returns:
            Whether it is complete: a limit of steps or time may have ended it before.
        """
        from_its_start, self._from_its_start = self._from_its_start, False
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher  # pyright: ignore[reportPrivateUsage] -- a stream below its limit ends unnoticed by the loop
        ran_out = fetcher is not None and fetcher.done
        if not (ran_out or epoch_loop._num_ready_batches_reached()):  # pyright: ignore[reportPrivateUsage] -- no public form
            return False
        progress: Any = epoch_loop.batch_progress.current  # typed as its base
        if from_its_start:
            self.learned = progress.processed or self.learned
        return True
