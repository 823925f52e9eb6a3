"""The arithmetic of the average: one step of it, for many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["Averaging", "Workspace", "pack", "separate", "update_average"]

# Private in torch; there is no public form of the foreach functions.
_torch: Any = torch

_PIECE = 1 << 22
"""How many elements are brought to another device at a time: 16 MiB in fp32."""

_BLOCK = {"cpu": 1 << 18}
"""How many elements are cast at a time, so that they are still in the cache; elsewhere `_PIECE`."""

_SMALL, _SMALL_CAST = 1 << 11, 1 << 15
"""Elements; below it, a call costs more than what it does, and neighbours share one; with a cast,
which is a call for each, sooner."""

_dtype_of = attrgetter("dtype")
_kind_of = attrgetter("dtype", "device")


class Workspace:
    """Memory for casts, used again at each update."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def block(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor with *size* elements, whatever they are."""
        known = self._blocks.get((dtype, device))
        if known is None or known.numel() < size:
            known = self._blocks[dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return known[:size]


class _Run(NamedTuple):
    """Averages that lie side by side, and so can be moved as one."""

    flat: Tensor
    take: Callable[[list[Tensor]], Sequence[Tensor]]
    """Gives their weights, of all."""
    is_flat: bool
    """Whether their weights need not be flattened."""


class _Plan(NamedTuple):
    """Who is moved how; indices of averages."""

    kinds: Any
    """Dtypes and devices of the weights that it is for."""
    alike: list[int]
    cast: list[int]
    runs: list[_Run]
    distant: list[int]


class Averaging:
    """Moves a list of averages, again and again; what can be found out once is kept.

    Args:
        averages: Tensors to update.
        workspace: Used where weights have another dtype; None takes one of its own.
    """

    def __init__(self, averages: list[Tensor], workspace: Workspace | None = None) -> None:
        self.averages = averages
        self._workspace = Workspace() if workspace is None else workspace
        self._plan = _Plan(None, [], [], [], [])

    def move(
        self, weights: list[Tensor], decay: float | Tensor, where: Tensor | None = None
    ) -> None:
        """Move the averages toward *weights*; see `update_average`."""
        # A module may be moved or cast, and keeps its parameters.
        kinds = list(map(_dtype_of, weights)), list(map(Tensor.get_device, weights))
        if kinds != self._plan.kinds:
            self._plan = _planned(self.averages, weights, kinds)
        plan, averages = self._plan, self.averages
        weight = 1 - decay
        if len(plan.alike) == len(averages):
            _lerp(averages, weights, weight, where)
            return
        _lerp([averages[i] for i in plan.alike], [weights[i] for i in plan.alike], weight, where)
        for run in plan.runs:
            self._move_run(run, weights, weight, where)
        for index in plan.cast:
            self._move_cast(averages[index], weights[index], weight, where)
        distant = [(averages[i], weights[i]) for i in plan.distant]
        for piece in _pieces(distant):
            brought = [w.to(a.device, a.dtype) for a, w in piece]
            _lerp([a for a, _ in piece], brought, weight, where)

    def _move_run(
        self, run: _Run, weights: list[Tensor], weight: float | Tensor, where: Tensor | None
    ) -> None:
        """Collect the small ones, cast them as one and move as one."""
        sources = list(run.take(weights))
        if not run.is_flat:
            sources = [source.reshape(-1) for source in sources]
        flat, first = run.flat, sources[0]
        collected = self._workspace.block(flat.numel(), first.dtype, first.device)
        torch.cat(sources, out=collected)
        if first.dtype == flat.dtype:
            self._lerp_flat(flat, collected, weight, where)
        else:
            self._cast_flat(flat, collected, weight, where)

    def _move_cast(
        self, average: Tensor, source: Tensor, weight: float | Tensor, where: Tensor | None
    ) -> None:
        if not source.is_contiguous():
            _lerp([average], [source.to(average.dtype)], weight, where)
            return
        average, source = average.view(-1), source.detach().view(-1)
        size = _block_size(average)
        for start in range(0, average.numel(), size):
            end = start + size
            self._cast_flat(average[start:end], source[start:end], weight, where)

    def _cast_flat(
        self, average: Tensor, source: Tensor, weight: float | Tensor, where: Tensor | None
    ) -> None:
        block = self._workspace.block(average.numel(), average.dtype, average.device)
        block.copy_(source)
        self._lerp_flat(average, block, weight, where)

    @staticmethod
    def _lerp_flat(
        average: Tensor, source: Tensor, weight: float | Tensor, where: Tensor | None
    ) -> None:
        if where is not None or isinstance(weight, Tensor):
            weight = _on(weight, where, average.device, average.dtype)
        average.lerp_(source, weight)


def update_average(
    average: list[Tensor],
    source: list[Tensor],
    decay: float | Tensor,
    *,
    where: Tensor | None = None,
) -> None:
    """Move *average* toward *source* in place: `average = decay*average + (1-decay)*source`.

    Args:
        average: Tensors to update.
        source: Same length and shapes; read only. Where dtype or device differ, they are copied a
            piece at a time.
        decay: In [0, 1]; a 0-dim tensor costs no synchronization.
        where: 0-dim bool tensor: False leaves *average* as it is. Costs no synchronization.

    Runs without communication; call it without autograd.

    Source: Polyak and Juditsky 1992, https://doi.org/10.1137/0330046.
    """
    Averaging(average).move(source, decay, where)


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


def _planned(averages: list[Tensor], weights: list[Tensor], kinds: Any) -> _Plan:
    plan = _Plan(kinds, [], [], [], [])
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
            plan.runs.append(_run(averages, weights, indices))
    return plan


def _by_itself(plan: _Plan, index: int, average: Tensor, weight: Tensor) -> None:
    if _kind_of(average) == _kind_of(weight):
        plan.alike.append(index)
    elif _is_flat(average, weight):
        plan.cast.append(index)
    else:
        plan.distant.append(index)


def _run(averages: list[Tensor], weights: list[Tensor], indices: list[int]) -> _Run:
    first = averages[indices[0]]
    size = sum(averages[i].numel() for i in indices)
    flat = first.as_strided((size,), (1,), first.storage_offset())
    if indices == list(range(indices[0], indices[-1] + 1)):
        take: Any = itemgetter(slice(indices[0], indices[-1] + 1))
    else:
        take = itemgetter(*indices)
    return _Run(flat, take, all(weights[i].dim() == 1 for i in indices))


def _neighbours(averages: list[Tensor], indices: list[int]) -> Iterator[list[int]]:
    """Split *indices* into runs of averages that lie side by side, a block at the most."""
    run: list[int] = []
    size = 0
    for index in indices:
        average = averages[index]
        if run and not (
            size + average.numel() <= _block_size(average)
            and _are_side_by_side(averages[run[-1]], average)
        ):
            yield run
            run, size = [], 0
        run.append(index)
        size += average.numel()
    if run:
        yield run


def _are_side_by_side(left: Tensor, right: Tensor) -> bool:
    if _kind_of(left) != _kind_of(right):
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


def _block_size(average: Tensor) -> int:
    return _BLOCK.get(average.device.type, _PIECE)


def _pieces(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
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


def _lerp(
    average: list[Tensor], source: list[Tensor], weight: float | Tensor, where: Tensor | None
) -> None:
    if not average:
        return
    if where is None and not isinstance(weight, Tensor):
        _torch._foreach_lerp_(average, source, weight)
        return
    # One tensor for each pair: a single one would be read by the host.
    kinds = list(map(_kind_of, average))
    weights = {kind: _on(weight, where, *reversed(kind)) for kind in set(kinds)}
    _torch._foreach_lerp_(average, source, [weights[kind] for kind in kinds])


def _on(
    weight: float | Tensor, where: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | float:
    if isinstance(weight, Tensor):
        weight = weight.to(device, dtype)
    return weight if where is None else where.to(device, dtype) * weight
