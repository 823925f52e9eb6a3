"""Sharded parameters (DTensor): the part on this rank, the whole, and a tensor laid out alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "like", "local", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether *tensor* is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of *tensor* that this rank holds; shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- a DTensor's


def whole(tensor: Tensor) -> Tensor:
    """*tensor* gathered from all ranks, a collective, in main memory; plain ones as they are."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- a DTensor's


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """*value*, which each rank has whole or as the same shard, laid out as *tensor* is."""
    if is_sharded(value) or not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    return distribute_tensor(value.to(tensor.device), sharded.device_mesh, sharded.placements)
