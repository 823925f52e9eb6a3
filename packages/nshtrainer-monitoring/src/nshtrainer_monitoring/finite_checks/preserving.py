"""Leaving a module as it was, whatever runs it meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

__all__ = ["logging_nothing", "parameters_unchanged", "replaced", "unchanged"]

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
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with replaced(pl_module, log=_nothing, log_dict=_nothing):
            yield
    finally:
        trainer.loggers = loggers


@contextlib.contextmanager
def replaced(holder: object, **values: Any) -> Generator[None]:
    """Give *holder* these attributes of its own inside the block; what it had before comes back."""
    attributes: dict[str, Any] = vars(holder)
    before = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            attributes.pop(name, None)
        attributes.update(before)


@contextlib.contextmanager
def parameters_unchanged(module: nn.Module) -> Generator[None]:
    """Put back, when the block ends, what it did to parameters of *module* and their gradients.

    What is not written to is not copied.
    """
    kept = [(p, p.data, p.grad, p.requires_grad) for p in module.parameters()]
    gradients = [grad for _, _, grad, _ in kept if grad is not None]
    writes = _CopyBeforeWrite([*(parameter for parameter, *_ in kept), *gradients])
    try:
        with writes:
            yield
    finally:
        for parameter, data, grad, requires_grad in kept:
            if _memory(parameter) != _memory(data):
                parameter.data = data
            parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
        for tensor, copy in writes.copies:
            tensor.data.copy_(copy)  # by `data`, which leaves autograd's counter of versions


class _CopyBeforeWrite(TorchDispatchMode):
    """Copies tensors before the first operation that writes to their memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] -- torch does not type it
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._whole: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.layout is torch.strided:
                self._whole.setdefault(_memory(tensor), []).append(tensor)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                by_place = args[place] if place < len(args) else None
                self._keep((kwargs or {}).get(argument.name, by_place))
        return func(*args, **(kwargs or {}))

    def _keep(self, written: Any) -> None:
        tensors = cast("list[Any]", written) if isinstance(written, (list, tuple)) else [written]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                for whole in self._whole.pop(_memory(tensor), ()):
                    self.copies.append((whole, whole.detach().clone()))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
