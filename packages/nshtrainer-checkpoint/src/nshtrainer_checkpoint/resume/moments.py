"""At which point of Lightning's loops a checkpoint was saved, and how they go on from there.

Lightning infers that from its progress counters and then leaves out what came after the save: the
validation that was due, the plateau schedulers, the end of an epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.loops.loop import _Loop  # pyright: ignore[reportPrivateUsage] -- its setter, without the fit loop's own rules

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["classify", "plateau_due", "prepare", "take_over"]


def classify(trainer: Trainer, *, in_epoch: bool) -> str:
    """Return where the loops are.

    One of `epoch_start` (its hooks run), `batch_end` (in or right after `on_train_batch_end`), `batch_done` (after
    it, and after the validation that follows), `mid_batch`, `validation_start` (before its end),
    `validation_end`, `epoch_end` (in `on_train_epoch_end`), `epoch_done`, and `stopped` (as the
    last two, but before the epoch's last batch).
    """
    fit_loop = cast("Any", trainer.fit_loop)
    loop = fit_loop.epoch_loop
    epoch, batch = fit_loop.epoch_progress.current, loop.batch_progress.current
    if trainer.validating:
        done = loop.val_loop._data_fetcher is not None and loop.val_loop._data_fetcher.done
        progress = loop.val_loop.batch_progress.current
        return (
            "validation_end"
            if done and progress.ready == progress.completed
            else "validation_start"
        )
    if epoch.processed == epoch.ready:
        if in_epoch and batch.ready and not loop._num_ready_batches_reached():
            return "stopped"
        return "epoch_done" if epoch.completed == epoch.processed else "epoch_end"
    if not in_epoch:
        return "epoch_start"
    if batch.ready != batch.processed:
        return "mid_batch"
    return "batch_done" if batch.completed == batch.processed else "batch_end"


def prepare(trainer: Trainer, moment: str) -> str | None:
    """Set the counters that were loaded so that the loops start where they were saved.

    Returns:
        What `take_over` is to do at the first batch.
    """
    fit_loop = cast("Any", trainer.fit_loop)
    loop = fit_loop.epoch_loop
    if moment == "mid_batch":
        loop.batch_progress.is_last_batch = False  # it is made anew, the last one of an epoch too
    if moment in ("epoch_end", "epoch_done"):
        # With max_steps, Lightning would otherwise end the same epoch twice.
        _Loop.restarting.fset(fit_loop, False)  # pyright: ignore[reportOptionalCall] -- it has a setter
        return None
    if moment == "stopped":
        epoch = fit_loop.epoch_progress
        for tracker in (epoch.total, epoch.current):
            tracker.completed -= tracker.completed == tracker.processed
            tracker.processed -= 1
        _Loop.restarting.fset(fit_loop, True)  # pyright: ignore[reportOptionalCall] -- it has a setter
        return "continue"
    if moment == "epoch_start":
        return None
    if moment == "batch_end":
        batch = loop.batch_progress
        for tracker in (batch.total, batch.current):
            tracker.completed = tracker.processed
        return "end_batch"
    if moment == "validation_end":
        return "end_batch_after_validation"
    return "end_batch" if moment == "validation_start" else "continue"


def take_over(trainer: Trainer, how: str) -> bool:
    """Do, in place of the first batch, the rest of the one that was saved in.

    Returns:
        Whether the first batch is to be trained on all the same.
    """
    fit_loop = cast("Any", trainer.fit_loop)
    loop = fit_loop.epoch_loop
    _Loop.restarting.fset(loop, False)  # pyright: ignore[reportOptionalCall] -- it has a setter
    fit_loop._restarting = False  # or plateau schedulers miss the end of this epoch
    if how == "continue":
        return True
    loop._skip_next_val = how == "end_batch_after_validation"
    return False


def plateau_due(trainer: Trainer) -> None:
    """Let the plateau schedulers step, as they do after `on_train_epoch_end`."""
    loop = cast("Any", trainer.fit_loop.epoch_loop)
    if loop._num_ready_batches_reached():
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
