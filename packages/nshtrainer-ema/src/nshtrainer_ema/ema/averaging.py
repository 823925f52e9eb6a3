"""The arithmetic of the average: one step of it, for many tensors at once."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .plan import Group, Plan, Run, block_size, is_fusable, kind_of, pieces, planned

__all__ = ["Averaging", "Workspace", "update_average"]

# Private in torch; there is no public form of the foreach functions.
_torch: Any = torch

_MAX_FUSED = 0.5
"""The weight from which on `lerp` rounds in another way than a fused SGD."""

_dtype_of = attrgetter("dtype")


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


class Averaging:
    """Moves a list of averages, again and again; what can be found out once is kept.

    Args:
        averages: Tensors to update.
        workspace: Used where weights have another dtype; None takes one of its own.
    """

    def __init__(self, averages: list[Tensor], workspace: Workspace | None = None) -> None:
        self.averages = averages
        self._workspace = Workspace() if workspace is None else workspace
        self._plan = Plan(None, [], False, [], [], [], [])
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def move(
        self, weights: list[Tensor], decay: float | Tensor, where: Tensor | None = None
    ) -> None:
        """Move the averages toward *weights*; see `update_average`."""
        # A module may be moved or cast, and keeps its parameters.
        kinds = list(map(_dtype_of, weights)), list(map(Tensor.get_device, weights))
        if kinds != self._plan.kinds:
            self._plan, self._views = planned(self.averages, weights, kinds), {}
        plan, averages = self._plan, self.averages
        weight = 1 - decay
        if len(plan.alike) == len(averages):
            _lerp(averages, weights, weight, where, is_fusable=plan.is_fusable)
            return
        alike = [averages[i] for i in plan.alike], [weights[i] for i in plan.alike]
        _lerp(*alike, weight, where, is_fusable=plan.is_fusable)
        for number, group in enumerate(plan.groups):
            self._move_group(number, group, weights, weight, where)
        for run in plan.runs:
            self._move_run(run, weights, weight, where)
        for index in plan.cast:
            self._move_cast(averages[index], weights[index], weight, where)
        distant = [(averages[i], weights[i]) for i in plan.distant]
        for piece in pieces(distant):
            brought = [w.to(a.device, a.dtype) for a, w in piece]
            _lerp([a for a, _ in piece], brought, weight, where)

    def _move_group(
        self,
        number: int,
        group: Group,
        weights: list[Tensor],
        weight: float | Tensor,
        where: Tensor | None,
    ) -> None:
        first = group.averages[0]
        size = sum(average.numel() for average in group.averages)
        block = self._workspace.block(size, first.dtype, first.device)
        known = self._views.get(number)
        if known is None or known[0].data_ptr() != block.data_ptr():
            parts = torch.split(block, [average.numel() for average in group.averages])
            views = [p.view(a.shape) for p, a in zip(parts, group.averages, strict=True)]
            known = self._views[number] = block, views
        views = known[1]
        _torch._foreach_copy_(views, list(group.take(weights)))
        _lerp(group.averages, views, weight, where, is_fusable=is_fusable(first, first))

    def _move_run(
        self, run: Run, weights: list[Tensor], weight: float | Tensor, where: Tensor | None
    ) -> None:
        """Collect the small ones, cast them as one and move as one."""
        sources = list(run.take(weights))
        for position in run.shaped:
            sources[position] = sources[position].reshape(-1)
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
        size = block_size(average)
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


def _lerp(
    average: list[Tensor],
    source: list[Tensor],
    weight: float | Tensor,
    where: Tensor | None,
    *,
    is_fusable: bool = False,
) -> None:
    if not average:
        return
    if is_fusable and where is not None and isinstance(weight, float) and weight < _MAX_FUSED:
        _fused_lerp(average, source, weight, where)
        return
    if where is None and not isinstance(weight, Tensor):
        _torch._foreach_lerp_(average, source, weight)
        return
    # One tensor for each pair: a single one would be read by the host.
    kinds = list(map(kind_of, average))
    weights = {kind: _on(weight, where, *reversed(kind)) for kind in set(kinds)}
    _torch._foreach_lerp_(average, source, [weights[kind] for kind in kinds])


def _fused_lerp(average: list[Tensor], source: list[Tensor], weight: float, where: Tensor) -> None:
    """Move all in one kernel that reads on the device whether to.

    It is that of `torch.optim.SGD(fused=True)`: with the weights for gradients, a weight decay of -1
    and the learning rate -weight, a step is average + weight * (source - average), bit for bit what
    `lerp` gives below a weight of 0.5.
    """
    _torch._fused_sgd_(
        average,
        source,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=(~where).to(average[0].device, torch.float32),
    )


def _on(
    weight: float | Tensor, where: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | float:
    if isinstance(weight, Tensor):
        weight = weight.to(device, dtype)
    return weight if where is None else where.to(device, dtype) * weight
