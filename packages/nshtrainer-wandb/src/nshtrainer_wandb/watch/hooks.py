"""`wandb.watch` on one module, and all of it taken off again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from lightning.pytorch import LightningModule
from torch import nn

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["HookedModule", "is_compiled", "is_watched"]

log = logging.getLogger(__name__)

_MARKS: Final = ("_wandb_watch_called", "_wandb_hook_names")


def is_watched(module: nn.Module) -> bool:
    """Whether `wandb.watch` has put hooks on *module*."""
    return hasattr(module, _MARKS[1])


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether torch.compile or TorchScript has to do with any part of *pl_module*."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:  # compiled as a whole, by Lightning
        return True
    return any(
        getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part, "_orig_mod")
        or "ScriptModule" in type(part).__name__
        for part in pl_module.modules()
    )


class HookedModule:
    """W&B's hooks on one module; rank zero only.

    Args:
        run: Where the records go.
        module: What is watched.
    """

    def __init__(self, run: Run, module: nn.Module) -> None:
        self._run, self._module = run, module

    def watch(self, *, log_freq: int, log_gradients: bool, log_graph: bool) -> None:
        """Put the hooks on; a module that W&B refuses is a warning."""
        _forget(self._module)
        try:
            # W&B counts watched models up over all runs of a process and puts the number into the
            # names; idx=0 keeps the names of each run's first model the same.
            self._run.watch(  # pyright: ignore[reportUnknownMemberType] -- wandb names a type that torch has not
                self._module,
                log="gradients" if log_gradients else None,
                log_freq=log_freq,
                idx=0,
                log_graph=log_graph,
            )
        except (RuntimeError, ValueError) as error:
            log.warning("%s cannot be watched by W&B: %s", type(self._module).__name__, error)
            self.release()

    def release(self) -> None:
        """Take everything off; nothing happens if there is nothing."""
        if not is_watched(self._module):
            return
        try:
            self._run.unwatch([self._module])
        except Exception as error:  # noqa: BLE001 -- must not hide the exception that ends the run
            log.warning("W&B left hooks on %s: %s", type(self._module).__name__, error)
        _forget(self._module)


def _forget(module: nn.Module) -> None:
    """Remove the marks with which W&B refuses to watch a module again; it does not do so itself."""
    for part in module.modules():
        for mark in _MARKS:
            part.__dict__.pop(mark, None)
