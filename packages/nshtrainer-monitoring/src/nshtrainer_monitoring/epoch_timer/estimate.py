"""How much of a training is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Timer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["remaining_batches", "remaining_seconds", "validations_per_batch"]


def remaining_batches(trainer: Trainer, batches_per_epoch: float) -> float:
    """Return how many training batches are left until `max_epochs` or `max_steps`.

    Args:
        trainer: At `on_train_batch_end`.
        batches_per_epoch: `inf` where it is not known.

    Returns:
        `inf` where the end cannot be foreseen.
    """
    return min(_limits(trainer, batches_per_epoch), default=math.inf)


def _limits(trainer: Trainer, batches_per_epoch: float) -> Iterator[float]:
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress  # typed as its base
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs = trainer.max_epochs - trainer.current_epoch
        yield max(0.0, epochs * batches_per_epoch - progress.current.processed)
    if trainer.max_steps >= 0:
        steps = max(0, trainer.max_steps - trainer.global_step)
        # Accumulation takes several batches for a step, several optimizers several steps a batch.
        done, made = progress.total.processed, trainer.global_step
        yield steps * (done / made if made else trainer.accumulate_grad_batches)


def validations_per_batch(trainer: Trainer, batches_per_epoch: float) -> float:
    """Return how many validations there are for each training batch, on average.

    0 where they come by the clock (a `val_check_interval` in time), which counts no batches.
    """
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None:
        return 0.0
    if trainer.check_val_every_n_epoch is None:
        return 1 / every if every else 0.0
    in_epoch = batches_per_epoch // every if math.isfinite(every) and every else 1
    return max(1.0, in_epoch) / (batches_per_epoch * trainer.check_val_every_n_epoch or math.inf)


def remaining_seconds(
    trainer: Trainer, batches_per_epoch: float, batch_s: float, validation_s: float
) -> float:
    """Return the seconds until the end of the training; `inf` where it cannot be foreseen.

    Args:
        trainer: At `on_train_batch_end`.
        batches_per_epoch: `inf` where it is not known.
        batch_s: What a batch takes.
        validation_s: What a validation takes.

    A `Timer` (`max_time`) may end the training earlier.
    """
    batches = remaining_batches(trainer, batches_per_epoch)
    seconds = math.inf
    if math.isfinite(batches):
        validation = validations_per_batch(trainer, batches_per_epoch) * validation_s
        seconds = batches * (batch_s + validation)
    lightning: Any = trainer  # `callbacks` is set by a connector, unknown to type checkers
    for callback in lightning.callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            seconds = min(seconds, max(0.0, left))
    return seconds
