"""Who is moved how: which averages share a call, and how they lie in memory for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "Group",
    "Plan",
    "Run",
    "block_size",
    "is_fusable",
    "kind_of",
    "pack",
    "pieces",
    "planned",
    "separate",
]

_PIECE = 1 << 22
"""How many elements are brought to another device at a time: 16 MiB in fp32."""

_BLOCK = {"cpu": 1 << 18}
"""How many elements are cast at a time, so that they are still in the cache; elsewhere `_PIECE`."""

_SMALL, _SMALL_CAST = 1 << 11, 1 << 15
"""Elements; below it, a call costs more than what it does, and neighbours share one; with a cast,
which is a call for each, sooner."""

_FUSED = ("cpu", "cuda")
"""Where torch has a fused SGD."""

kind_of = attrgetter("dtype", "device")


class Run(NamedTuple):
    """Averages that lie side by side, and so can be moved as one."""

    flat: Tensor
    take: Callable[[list[Tensor]], Sequence[Tensor]]
    """Gives their weights, of all."""
    shaped: list[int]
    """Which of these have to be flattened."""


class Group(NamedTuple):
    """Averages that are cast for and moved in a few calls, a block of elements at a time."""

    averages: list[Tensor]
    take: Callable[[list[Tensor]], Sequence[Tensor]]
    """Gives their weights, of all."""


class Plan(NamedTuple):
    """Who is moved how; indices of averages."""

    kinds: Any
    """Dtypes and devices of the weights that it is for."""
    alike: list[int]
    is_fusable: bool
    """Whether those alike can be moved by the kernel of a fused optimizer."""
    cast: list[int]
    groups: list[Group]
    runs: list[Run]
    distant: list[int]


def planned(averages: list[Tensor], weights: list[Tensor], kinds: Any) -> Plan:
    """Say how *averages* are moved toward *weights*, of these dtypes and devices."""
    plan = Plan(kinds, [], False, [], [], [], [])
    small: dict[torch.dtype, list[int]] = {}  # by the dtype of the weights
    for index, (average, weight) in enumerate(zip(averages, weights, strict=True)):
        if _runs(average, weight):
            small.setdefault(weight.dtype, []).append(index)
        else:
            _by_itself(plan, index, average, weight)
    for indices in (run for alike in small.values() for run in _neighbours(averages, alike)):
        if len(indices) == 1:
            _by_itself(plan, indices[0], averages[indices[0]], weights[indices[0]])
        else:
            plan.runs.append(_as_run(averages, weights, indices))
    cast = [i for i in plan.cast if not _is_grouped(averages[i])]
    groups = _groups(averages, [i for i in plan.cast if _is_grouped(averages[i])])
    fusable = all(is_fusable(averages[i], weights[i]) for i in plan.alike)
    return plan._replace(cast=cast, groups=list(groups), is_fusable=fusable)


def _is_grouped(average: Tensor) -> bool:
    """Whether casts for many are one kernel, and *average* need not be cut in pieces for it."""
    return average.device.type not in _BLOCK and average.numel() <= _PIECE


def _groups(averages: list[Tensor], indices: list[int]) -> Iterator[Group]:
    kinds: dict[Any, list[int]] = {}
    for index in indices:
        kinds.setdefault(kind_of(averages[index]), []).append(index)
    for alike in kinds.values():
        for group in _portions(averages, alike):
            take: Any = (
                itemgetter(*group) if len(group) > 1 else itemgetter(slice(group[0], group[0] + 1))
            )
            yield Group([averages[i] for i in group], take)


def _portions(averages: list[Tensor], indices: list[int]) -> Iterator[list[int]]:
    """Split *indices* into runs of at most `_PIECE` elements."""
    portion: list[int] = []
    size = 0
    for index in indices:
        if portion and size + averages[index].numel() > _PIECE:
            yield portion
            portion, size = [], 0
        portion.append(index)
        size += averages[index].numel()
    if portion:
        yield portion


def is_fusable(average: Tensor, weight: Tensor) -> bool:
    """Whether torch's fused SGD takes the two: alike in everything, real and on a device it knows."""
    return (
        _is_plain(average)
        and _is_plain(weight)
        and average.is_floating_point()
        and average.device.type in _FUSED
        and average.stride() == weight.stride()
    )


def _by_itself(plan: Plan, index: int, average: Tensor, weight: Tensor) -> None:
    if kind_of(average) == kind_of(weight):
        plan.alike.append(index)
    elif _is_flat(average, weight):
        plan.cast.append(index)
    else:
        plan.distant.append(index)


def _as_run(averages: list[Tensor], weights: list[Tensor], indices: list[int]) -> Run:
    first = averages[indices[0]]
    size = sum(averages[i].numel() for i in indices)
    flat = first.as_strided((size,), (1,), first.storage_offset())
    if indices == list(range(indices[0], indices[-1] + 1)):
        take: Any = itemgetter(slice(indices[0], indices[-1] + 1))
    else:
        take = itemgetter(*indices)
    shaped = [position for position, i in enumerate(indices) if weights[i].dim() != 1]
    return Run(flat, take, shaped)


def _neighbours(averages: list[Tensor], indices: list[int]) -> Iterator[list[int]]:
    """Split *indices* into runs of averages that lie side by side, a block at the most."""
    run: list[int] = []
    size = 0
    for index in indices:
        average = averages[index]
        if run and not (
            size + average.numel() <= block_size(average)
            and _are_side_by_side(averages[run[-1]], average)
        ):
            yield run
            run, size = [], 0
        run.append(index)
        size += average.numel()
    if run:
        yield run


def _are_side_by_side(left: Tensor, right: Tensor) -> bool:
    if kind_of(left) != kind_of(right):
        return False
    same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    gap = right.storage_offset() - left.storage_offset()
    return same and bool(gap == left.numel())


def _runs(average: Tensor, weight: Tensor) -> bool:
    """Whether *average* is better moved together with its neighbours."""
    # On other devices a foreach function moves tensors of one dtype in one kernel.
    if average.dtype != weight.dtype:
        limit = _SMALL_CAST
    else:
        limit = _SMALL if average.device.type == "cpu" else 0
    return average.numel() < limit and _is_flat(average, weight)


def _is_flat(average: Tensor, weight: Tensor) -> bool:
    """Whether *average* can be moved in flat blocks."""
    return (
        average.device == weight.device
        and _is_plain(average)
        and _is_plain(weight)
        and average.is_contiguous()
        and average.numel() > 0
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided


def _shares(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def block_size(average: Tensor) -> int:
    """Return how many elements are cast at a time where *average* is."""
    return _BLOCK.get(average.device.type, _PIECE)


def pieces(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield *pairs* in runs of about `_PIECE` elements, so that few are held twice at a time."""
    piece: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        piece.append(pair)
        size += pair[0].numel()
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def pack(averages: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Lay small *averages* side by side in one storage where that is faster; returns all of them.

    Collecting, casting and moving a thousand small tensors then takes three calls, and no more
    memory. What has a storage in common with others already is left there.
    """
    packed = list(averages)
    kinds: dict[Any, list[int]] = {}
    for index, (average, weight) in enumerate(zip(averages, weights, strict=True)):
        if _runs(average, weight) and not _shares(average):
            kinds.setdefault((average.dtype, weight.dtype, average.device), []).append(index)
    for indices in kinds.values():
        if len(indices) > 1:
            flat = torch.cat([averages[i].reshape(-1) for i in indices])
            parts = torch.split(flat, [averages[i].numel() for i in indices])
            for index, part in zip(indices, parts, strict=True):
                packed[index] = part.view(averages[index].shape)
    return packed


def separate(average: Tensor) -> Tensor:
    """*average*, or a copy if it shares its storage with others (`pack`)."""
    return average.clone() if _is_plain(average) and _shares(average) else average
