"""Run-time events: methods that any callback may define, called by whoever makes them happen.

Lightning's own hooks say nothing of a committed checkpoint or of a skipped optimizer step. These
events do, with no import between the one that emits and the one that listens. The protocols
below are documentation and types; a callback needs no base class, only the method.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "ON_CHECKPOINT_PREPARE",
    "ON_CHECKPOINT_REMOVED",
    "ON_CHECKPOINT_SAVED",
    "ON_OPTIMIZER_STEP_SKIPPED",
    "CheckpointPrepareListener",
    "CheckpointRemovedListener",
    "CheckpointSavedListener",
    "OptimizerStepSkippedListener",
    "emit",
    "name_culprit",
]

log = logging.getLogger(__name__)

ON_CHECKPOINT_PREPARE: Final = "on_checkpoint_prepare"
ON_CHECKPOINT_SAVED: Final = "on_checkpoint_saved"
ON_CHECKPOINT_REMOVED: Final = "on_checkpoint_removed"
ON_OPTIMIZER_STEP_SKIPPED: Final = "on_optimizer_step_skipped"

# A file that one listener could not prepare must not be written; the others only report what is
# already a fact, which no listener can undo.
_PROPAGATED: Final = frozenset({ON_CHECKPOINT_PREPARE})


@runtime_checkable
class CheckpointPrepareListener(Protocol):
    """Edits a checkpoint before it is written."""

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: MutableMapping[str, Any],
        weights_only: bool,
    ) -> None:
        """Edit *checkpoint* in place; called on every rank, once per save.

        *weights_only* is true where the file holds no optimizer or callback state. What this
        raises stops the save before anything is written.
        """
        ...


@runtime_checkable
class CheckpointSavedListener(Protocol):
    """Hears of checkpoints that are complete on disk."""

    def on_checkpoint_saved(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        path: Path,
        metadata: Mapping[str, Any],
    ) -> None:
        """Use the committed checkpoint at *path*; *metadata* is the content of its sidecar."""
        ...


@runtime_checkable
class CheckpointRemovedListener(Protocol):
    """Hears of checkpoints that were deleted."""

    def on_checkpoint_removed(
        self, trainer: Trainer, pl_module: LightningModule, path: Path
    ) -> None:
        """Forget the checkpoint that was at *path*."""
        ...


@runtime_checkable
class OptimizerStepSkippedListener(Protocol):
    """Hears of optimizer steps that changed no weight."""

    def on_optimizer_step_skipped(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        count: int,
        reasons: Sequence[str],
    ) -> None:
        """Account for *count* steps skipped since the last such event.

        Called on every rank. A skip that the host decides is reported at once. One that only the
        device knows is reported at the next logging step, or when training ends, together with
        the others since then; *reasons* are distinct, in no order that carries meaning.
        """
        ...


def emit(trainer: Trainer, event: str, *args: Any, propagate: bool | None = None) -> None:
    """Call `callback.<event>(trainer, pl_module, *args)` on each callback that has the method.

    Args:
        trainer: Its `callbacks` are asked in their order.
        event: Name of the method, one of the constants of this module or a plugin's own.
        args: What follows the trainer and the module.
        propagate: Whether the first exception stops the round and reaches the caller. `None`:
            only for `on_checkpoint_prepare`. Otherwise it is logged with the callback's name and
            the remaining listeners are called.

    Raises:
        Exception: What a listener raised, if it is propagated, with a note that names the
            callback.
    """
    if propagate is None:
        propagate = event in _PROPAGATED
    for callback in list(trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownArgumentType, reportUnknownMemberType] -- set by Lightning's connector
        listener = getattr(callback, event, None)  # pyright: ignore[reportUnknownArgumentType] -- as above
        if not callable(listener):
            continue
        try:
            listener(trainer, trainer.lightning_module, *args)
        except Exception as error:
            name = type(callback).__qualname__  # pyright: ignore[reportUnknownArgumentType] -- as above
            if propagate:
                name_culprit(error, f"raised by {name}.{event}")
                raise
            log.exception(
                "%s.%s failed; the event has happened all the same and the other callbacks are "
                "told. Repair or remove that callback.",
                name,
                event,
            )


def name_culprit(error: BaseException, note: str) -> None:
    """Attach *note* to *error* without changing its type, so that `except` clauses still match.

    The traceback shows it on Python 3.11 and newer; on 3.10 it is logged.
    """
    add_note = getattr(error, "add_note", None)
    if add_note is None:
        log.error("%s: %s", note, error)
    else:
        add_note(note)
