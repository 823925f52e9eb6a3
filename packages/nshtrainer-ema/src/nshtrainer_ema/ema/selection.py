"""What of a module can have an average, and whether it is still the same."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nshtrainer.selection import NameSelection

__all__ = ["BufferSlot", "ModuleContent", "buffer_slots"]


_requires_grad = operator.attrgetter("requires_grad")


@dataclass(frozen=True)
class BufferSlot:
    """The place of a buffer; a forward pass may put another tensor there."""

    name: str
    owner: nn.Module
    key: str
    is_averaged: bool
    """Whether an average of it is a number that means something; else it is copied."""

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        return self.owner.get_buffer(self.key)


class ModuleContent:
    """The parameters of a module, and which need a gradient: to notice fast that it has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._children, self._parameters, self._flags = self._look()

    def is_of(self, module: nn.Module) -> bool:
        """Whether *module* is the one that was given, and has what it had then."""
        if module is not self._modules[0]:
            return False
        children, parameters, flags = self._look()
        return (
            flags == self._flags
            and _same(children, self._children)
            and _same(parameters, self._parameters)
        )

    def _look(self) -> tuple[list[Any], list[Any], list[bool]]:
        children = [c for m in self._modules for c in m._modules.values()]  # pyright: ignore[reportPrivateUsage] -- `children` takes each once, which is slow
        parameters = [p for m in self._modules for p in m._parameters.values() if p is not None]  # pyright: ignore[reportPrivateUsage] -- as above
        return children, parameters, list(map(_requires_grad, parameters))


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))


def buffer_slots(module: nn.Module, selection: NameSelection) -> Iterator[BufferSlot]:
    """Yield the persistent buffers of *module* that are selected, each once."""
    seen: set[int] = set()
    modules = cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
    for prefix, owner in modules:
        transient = owner._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage] -- no public way
        unit_vectors = set(_of_spectral_norm(owner))
        for key, buffer in owner.named_buffers(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            if key in transient or id(buffer) in seen or name not in selection:
                continue
            seen.add(id(buffer))
            averaged = key not in unit_vectors and _has_a_mean(buffer)
            yield BufferSlot(name, owner, key, averaged)


def _has_a_mean(buffer: Tensor) -> bool:
    numeric = buffer.is_floating_point() or buffer.is_complex()
    return numeric and bool(torch.isfinite(buffer).all())


def _of_spectral_norm(owner: nn.Module) -> Iterator[str]:
    """Names of the singular vectors, whose averages would not have length 1."""
    if type(owner).__name__ == "_SpectralNorm":  # torch.nn.utils.parametrizations
        yield from ("_u", "_v")
    hooks = cast("dict[int, Any]", owner._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage] -- no public way
    for hook in hooks.values():  # torch.nn.utils.spectral_norm
        if type(hook).__name__ == "SpectralNorm":
            yield from (f"{hook.name}_u", f"{hook.name}_v")
