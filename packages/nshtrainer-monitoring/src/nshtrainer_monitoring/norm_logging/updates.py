"""What a step does to the weights: a copy before it, the difference after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .modules import on_one_device

__all__ = ["change_in_place", "copies", "moments", "ratio", "ratios"]

# There is no public form of the foreach functions.
_torch: Any = torch


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of *tensors*, detached; of DTensors each rank copies its own part."""
    detached = [tensor.detach() for tensor in tensors]
    if not detached or any(type(tensor) is not Tensor for tensor in detached):
        return [tensor.clone() for tensor in detached]
    return list(_torch._foreach_mul(detached, 1.0))


def change_in_place(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Make of *before*, which `copies` returned, the difference to *now* (its sign is the other one)."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for old, new in zip(map(_stored, before), map(_stored, now), strict=True):
        olds, news = groups.setdefault((old.device, old.dtype), ([], []))
        olds.append(old)
        news.append(new)
    for olds, news in groups.values():
        _torch._foreach_sub_(olds, news)


def moments(
    states: Mapping[Tensor, Mapping[str, Any]],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    key: str,
) -> tuple[list[str], list[Tensor]]:
    """Return names and tensors of what an optimizer keeps under *key*, such as `exp_avg`."""
    kept = [
        (name, states[parameter].get(key))
        for name, parameter in zip(names, parameters, strict=True)
        if parameter in states
    ]
    found = [(name, tensor) for name, tensor in kept if isinstance(tensor, Tensor)]
    return [name for name, _ in found], [tensor.detach() for _, tensor in found]


def ratio(update: Tensor, weights: Tensor) -> Tensor:
    """Return `update/weights`, of norms; 0 where there was no update, whatever the weights."""
    return torch.where(update == 0, torch.zeros_like(update), update / weights)


def ratios(updates: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `ratio` by name, for the names in both."""
    names = [name for name in updates if name in weights]
    if not names:
        return {}
    update = on_one_device(updates[name] for name in names)
    before = on_one_device(weights[name] for name in names).to(update.device)
    return dict(zip(names, ratio(update, before).unbind(), strict=True))


def _stored(tensor: Tensor) -> Tensor:
    """The tensor in which this rank keeps its part."""
    tensor = tensor.detach()
    if type(tensor) is Tensor:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
