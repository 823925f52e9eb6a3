"""Loads the weights of the best checkpoint into the module when early stopping has ended training.

The checkpoint is that of a callback of the same trainer, found and read as Lightning's own
`ckpt_path="best"` does: by `monitor`, `mode` and `best_model_path`, and through the strategy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from nshtrainer.callbacks.callback import silence_unused_hooks
from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.sidecar import damage_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["DamagedCheckpointError", "RestoreAtEnd", "best_checkpoint_callback", "restore"]

log = logging.getLogger(__name__)


class DamagedCheckpointError(NshTrainerError, RuntimeError):
    """A checkpoint is not what was saved, or does not fit the module."""


class RestoreAtEnd(Callback):
    """Stands behind all other callbacks of one fit, and calls *restore* when training has ended.

    At that point every checkpoint of this training is saved, with the weights as trained, and what
    was written in the background is there.

    Args:
        restore: Loads the weights if that is called for; says whether it has.
    """

    def __init__(self, restore: Callable[[Trainer], bool]) -> None:
        self._restore = restore
        self._has_restored = False
        silence_unused_hooks(self)

    def attach(self, trainer: Trainer) -> None:
        """Take the last place among the callbacks of *trainer*, until teardown or an exception."""
        # A new list: Lightning is iterating over the present one.
        trainer.callbacks = [*_callbacks(trainer), self]  # pyright: ignore[reportAttributeAccessIssue] -- set by Lightning's connector

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_restored = self._restore(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(trainer)
        if self._has_restored:
            # An average of the weights as trained is not that of the ones that are here now. EMA
            # looks, when it is used next, whether they were written to after its own teardown.
            for parameter in pl_module.parameters():
                if not parameter.is_inference():
                    torch.autograd.graph.increment_version(parameter)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        trainer.callbacks = [c for c in _callbacks(trainer) if c is not self]  # pyright: ignore[reportAttributeAccessIssue] -- as above


def best_checkpoint_callback(trainer: Trainer, monitor: str, mode: str) -> Any:
    """Return the first callback of *trainer* that keeps the best checkpoint by this metric.

    Raises:
        ConfigError: There is none, or the strategy cannot load weights into a running module.
    """
    strategy: Any = type(trainer.strategy)
    if strategy.load_checkpoint is not Strategy.load_checkpoint and not issubclass(
        strategy, ModelParallelStrategy
    ):
        raise ConfigError(
            f"restore_best_weights does not work with {strategy.__name__}, which reads checkpoints "
            "in a way of its own; switch it off, and load the best checkpoint after training."
        )
    saving: list[Any] = list(trainer.checkpoint_callbacks)
    for callback in saving:
        watched = (getattr(callback, "monitor", None), getattr(callback, "mode", None))
        if watched == (monitor, mode) and getattr(callback, "save_top_k", 1) != 0:
            return callback
    found = ", ".join(_describe(callback) for callback in saving) or "none at all"
    raise ConfigError(
        f"restore_best_weights needs a checkpoint callback that keeps the best by {monitor!r} "
        f"({mode}), and there is none. Checkpoint callbacks: {found}. Add "
        f"BestCheckpointCallbackConfig, or ModelCheckpoint(monitor={monitor!r}, mode={mode!r}), or "
        "switch restore_best_weights off."
    )


def restore(trainer: Trainer, callback: Any) -> str | None:
    """Load the weights of the best checkpoint of *callback* into the module; a collective.

    The module gets all of them, or keeps what it has on every rank: then a warning says why.

    Returns:
        The checkpoint that was loaded, or None.
    """
    module = trainer.lightning_module
    path: str = trainer.strategy.broadcast(str(getattr(callback, "best_model_path", "") or ""))
    if not path:
        _warn(trainer, "no checkpoint was saved for it")
        return None
    checkpoint: dict[str, Any] = {}
    with _agreeing(trainer) as failure:
        _wait_for_background(trainer)
        if trainer.is_global_zero:
            _check_file(Path(path))
        if not _loads_in_place(trainer):
            checkpoint = _read(trainer, path)
    if not failure:
        backup = _copies(module)
        with _agreeing(trainer) as failure:
            if _loads_in_place(trainer):
                _load_in_place(trainer, path)
            else:
                trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
        if failure:
            _put_back(backup)
    if failure:
        _warn(trainer, f"{path} could not be loaded: {failure[0]}")
        return None
    rank_zero_info(f"Early stopping: the module has the weights of the best checkpoint, {path}")
    return path


def check_fits(module: LightningModule, state: dict[str, Any]) -> None:
    """Find out, before anything is changed, whether *module* can load *state*.

    Raises:
        DamagedCheckpointError: A tensor has another shape, or one is missing or too many although
            the module's `strict_loading` is on.
    """
    own = module.state_dict()
    wrong = [k for k in own.keys() & state.keys() if _shape(own[k]) != _shape(state[k])]
    if module.strict_loading:
        wrong += own.keys() ^ state.keys()
    if wrong:
        raise DamagedCheckpointError(
            f"it does not fit the module at {', '.join(sorted(wrong)[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )


def _check_file(path: Path) -> None:
    """Compare a checkpoint with the metadata that nshtrainer-checkpoint keeps beside it, if any."""
    damage = damage_of(path)
    if damage is not None:
        raise DamagedCheckpointError(damage)


def _read(trainer: Trainer, path: str) -> dict[str, Any]:
    """Return the checkpoint at *path*, edited by the module's own hook, and known to fit."""
    module = trainer.lightning_module
    checkpoint = trainer.strategy.load_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    check_fits(module, checkpoint["state_dict"])
    return checkpoint


def _loads_in_place(trainer: Trainer) -> bool:
    """Whether reading and loading are one, as for sharded weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def _load_in_place(trainer: Trainer, path: str) -> None:
    """Read the ranks' parts of the weights, and of the optimizers, into those that are there."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        trainer.strategy.load_checkpoint(path)
    except CheckpointException as error:  # a BaseException
        ranks = ", ".join(map(str, sorted(error.failures)))
        raise DamagedCheckpointError(f"a part of it cannot be read on rank {ranks}") from error


def _wait_for_background(trainer: Trainer) -> None:
    """Wait until a plugin that saves in the background has written; raises what went wrong."""
    checkpoint_io = trainer.strategy.checkpoint_io
    if isinstance(checkpoint_io, AsyncCheckpointIO):
        checkpoint_io.teardown()  # the next save begins a new thread


@contextlib.contextmanager
def _agreeing(trainer: Trainer) -> Generator[list[str]]:
    """Collect what fails in the block; after it, the list is empty on every rank or on none."""
    failure: list[str] = []
    try:
        yield failure
    except Exception as error:
        log.debug("the best checkpoint could not be loaded", exc_info=True)
        text = str(error).strip().partition("\n")[0]
        failure.append(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    succeeded = trainer.strategy.reduce_boolean_decision(not failure, all=True)
    if not (succeeded or failure):
        failure.append("another rank could not load it")


def _copies(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each parameter and buffer, or the part of it that this rank holds, with a copy on the host."""
    held = [_local(tensor.detach()) for tensor in (*module.parameters(), *module.buffers())]
    return [(tensor, tensor.to("cpu", copy=True)) for tensor in held]


@torch.no_grad()
def _put_back(backup: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, copy in backup:
        tensor.copy_(copy)


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast("Tensor", to_local())


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _describe(callback: Any) -> str:
    monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
    watched = f"{monitor!r} ({mode})" if monitor is not None else "no metric"
    return f"{type(callback).__name__} with {watched}"


def _warn(trainer: Trainer, why: str) -> None:
    if trainer.is_global_zero:
        log.warning(
            "restore_best_weights: the module keeps the weights of the last step, since %s. "
            "Load another checkpoint by hand if you need earlier ones.",
            why,
        )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType] -- as above
