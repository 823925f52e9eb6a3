"""Leaving a module as it was, whatever runs it meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, Final, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

__all__ = ["logging_nothing", "unchanged"]

# Large, and not what a forward pass writes to; the modules are visited one by one.
_NOT_COPIED: Final = frozenset({"_parameters", "_modules"})


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Generator[None]:
    """Put back, when the block ends, what it changed in *module* and the modules in it.

    Buffers (BatchNorm statistics), metrics (torchmetrics), counters and other attributes, lists,
    sets and dictionaries among them. Not parameters, and not what other objects hold.
    """
    kept = [(vars(part), _copied(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for attributes, copies in kept:
                for name in [name for name in attributes if name not in copies]:
                    del attributes[name]
                for name, (value, copy) in copies.items():
                    attributes[name] = _restored(value, copy)


@contextlib.contextmanager
def logging_nothing(trainer: Trainer, pl_module: LightningModule) -> Generator[None]:
    """Have `log`, `log_dict` and the loggers do nothing inside the block."""
    loggers = trainer.loggers
    attributes = vars(pl_module)
    own = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    trainer.loggers = [DummyLogger() for _ in loggers]
    attributes.update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in ("log", "log_dict"):
            del attributes[name]
        attributes.update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that logs."""


def _copied(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of what it holds."""
    return {
        name: (value, _copy(value, deep=name not in _NOT_COPIED))
        for name, value in attributes.items()
    }


def _copy(value: Any, *, deep: bool) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {
            k: (v, _copy(v, deep=False) if deep and isinstance(v, Tensor) else v) for k, v in items
        }
    if isinstance(value, (list, set)):
        return list(cast("list[Any]", value))
    return value


def _restored(value: Any, copy: Any) -> Any:
    """Return *value*, with the content that it had when *copy* was made."""
    if copy is value:
        return value
    if isinstance(value, Tensor):
        if not torch.equal(value, copy):  # one that is expanded cannot be written to
            value.detach().copy_(copy)
    elif isinstance(value, dict):
        content = cast("dict[Any, Any]", value)
        content.clear()
        content.update({k: _restored(v, c) for k, (v, c) in copy.items()})
    elif isinstance(value, list):
        cast("list[Any]", value)[:] = copy
    elif isinstance(value, set):
        cast("set[Any]", value).clear()
        cast("set[Any]", value).update(copy)
    return cast("Any", value)
