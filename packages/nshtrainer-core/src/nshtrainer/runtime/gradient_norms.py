"""Norms of gradients: one fused pass, in at least fp32, right for sharded tensors, on the device.

Per tensor first, then a total from those norms, so asking for both costs one read of the
gradients. On the CPU small gradients of one size are collected as the rows of a matrix: a call for
each costs more than what it does. Nothing here waits for the device, except what returns names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

# Untyped or private in torch's stubs; there is no public form of the foreach functions.
_torch: Any = torch

_Kind: TypeAlias = tuple[torch.device, torch.dtype]

_SMALL: Final = 1 << 11
"""Elements; below it, a gradient on the CPU is collected with others of its size."""
_FEW: Final = 4
"""Gradients; fewer of one size are not worth it."""
_BLOCK: Final = 1 << 17
"""Elements that are collected at a time, so that they are still in the cache."""

_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")
_is_sparse, _is_cpu = attrgetter("is_sparse"), attrgetter("is_cpu")

__all__ = [
    "FiniteEvidence",
    "GradientNorms",
    "TensorGroup",
    "largest_names",
    "local_shard",
    "measure_groups",
    "measure_norms",
    "non_finite_names",
    "scale_in_place",
]


@dataclass(frozen=True)
class FiniteEvidence:
    """What is left of gradients from which those with a NaN or Inf can be named later."""

    names: Sequence[str]
    """Of the parameters, in the order of `values`."""
    values: Tensor
    """Their norms: 1-dim, fp32 or wider."""

    def non_finite(self) -> list[str]:
        """Return the names of those that are not finite; waits for the device.

        A norm that overflowed reads as not finite.
        """
        if not self.names:
            return []
        flags = cast("list[bool]", torch.isfinite(self.values).tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
        return [name for name, is_one in zip(self.names, flags, strict=True) if not is_one]


@dataclass(frozen=True)
class GradientNorms:
    """Norms of one optimizer's gradients; 0-dim tensors on the device, fp32 or wider."""

    totals: Mapping[float, Tensor]
    """Norm type to the norm over all gradients together."""
    per_parameter: Mapping[float, Mapping[str, Tensor]]
    """Norm type to parameter name to norm; parameters without a gradient are left out."""
    finite: Tensor | None
    """Whether the norm, hence every gradient, is finite (bool, 0-dim); `None` if not asked for.

    A finite fp32 gradient above 1.8e19 overflows when squared and reads as not finite here;
    `GradientStep.non_finite_parameters` tells the two apart.
    """
    evidence: FiniteEvidence | None = None
    """Which gradients are finite, to be read later; `None` if not asked for."""

    def scaled_by(self, coefficient: Tensor) -> GradientNorms:
        """Return the norms after every gradient was multiplied by *coefficient* (>= 0)."""
        return GradientNorms(
            totals={p: total * coefficient for p, total in self.totals.items()},
            per_parameter={
                p: dict(
                    zip(
                        norms,
                        _torch._foreach_mul(list(norms.values()), coefficient) if norms else (),
                        strict=True,
                    )
                )
                for p, norms in self.per_parameter.items()
            },
            finite=self.finite,
            evidence=self.evidence,
        )


def measure_norms(
    names: Sequence[str],
    grads: Sequence[Tensor],
    *,
    totals: Collection[float],
    per_parameter: Collection[float],
    finite: bool,
    scale: Tensor | None,
    device: torch.device,
    evidence: bool = False,
) -> GradientNorms:
    """Measure *grads* with no host synchronization.

    Args:
        names: One per gradient.
        grads: Dense, sparse or DTensor, of any devices and dtypes.
        totals: Norm types wanted over all gradients; each positive, `inf` included.
        per_parameter: Norm types wanted for each gradient.
        finite: Whether to fill `GradientNorms.finite`.
        scale: What the gradients are still multiplied by (a GradScaler's scale), 0-dim.
        device: Where totals live, and zeros if there is no gradient.
        evidence: Whether to fill `GradientNorms.evidence`; needs *finite*.

    DTensors take part in one collective per norm type and mesh, so every rank has to call.
    """
    wanted = set(totals) | set(per_parameter)
    if finite and not wanted:
        wanted.add(2.0)
    kind = _one_kind(grads)
    # A finite check needs one total; the 2-norm where there is one, since it is the cheapest.
    checked = (2.0 if 2.0 in wanted else min(wanted)) if finite else None
    blocks = _Blocks.of(grads, kind)
    collected = blocks.norms(wanted, scale) if blocks is not None else {}
    each: dict[float, Sequence[Tensor]] = {}
    whole: dict[float, Tensor] = {}
    kept: FiniteEvidence | None = None
    for p in sorted(wanted):
        if blocks is None:
            norms = _norms(grads, p, scale, kind)
            flat = _together(norms, device, alike=kind is not None)
        else:
            flat = collected[p]
            norms = blocks.in_order(flat.unbind()) if p in per_parameter else ()
            flat = flat.to(device, non_blocking=True)
        each[p] = norms
        if p in totals or p == checked:
            whole[p] = _whole(flat, p)
        if evidence and p == checked:
            kept = FiniteEvidence(
                names if blocks is None else [names[i] for i in blocks.order], flat
            )
    return GradientNorms(
        totals={p: whole[p] for p in totals},
        per_parameter={p: dict(zip(names, each[p], strict=True)) for p in per_parameter},
        finite=None if checked is None else torch.isfinite(whole[checked]),
        evidence=kept,
    )


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are measured together with those of other groups, and what is wanted of them."""

    names: Sequence[str]
    """One per tensor."""
    tensors: Sequence[Tensor]
    """Dense, sparse or DTensor, of any devices and dtypes."""
    totals: Collection[float] = ()
    """Norm types wanted over all tensors of the group."""
    per_parameter: Collection[float] = ()
    """Norm types wanted for each tensor."""


def measure_groups(
    groups: Mapping[str, TensorGroup], *, device: torch.device
) -> dict[str, GradientNorms]:
    """Measure several groups in one fused pass for each norm type, with no host synchronization.

    Args:
        groups: Key to tensors; what a step changed and what the optimizer keeps, for example.
        device: Where totals live, and zeros of a group without tensors.

    Returns:
        The keys of *groups* and their norms; `finite` is not filled.

    As with `measure_norms`, every rank has to call where there are DTensors.
    """
    each: dict[str, dict[float, list[Tensor]]] = {key: {} for key in groups}
    whole: dict[str, dict[float, Tensor]] = {key: {} for key in groups}
    wanted = {p for group in groups.values() for p in (*group.totals, *group.per_parameter)}
    for p in sorted(wanted):
        asking = {k: g for k, g in groups.items() if p in g.totals or p in g.per_parameter}
        tensors = [tensor for group in asking.values() for tensor in group.tensors]
        kind = _one_kind(tensors)
        norms = iter(_norms(tensors, p, None, kind))
        for key, group in asking.items():
            each[key][p] = list(islice(norms, len(group.tensors)))
            if p in group.totals:
                whole[key][p] = _whole(_together(each[key][p], device, alike=kind is not None), p)
    return {
        key: GradientNorms(
            totals=whole[key],
            per_parameter={
                p: dict(zip(group.names, each[key][p], strict=True)) for p in group.per_parameter
            },
            finite=None,
        )
        for key, group in groups.items()
    }


def non_finite_names(names: Sequence[str], grads: Sequence[Tensor]) -> list[str]:
    """Return the names of gradients with a NaN or Inf; exact, and one wait for the device."""
    if not grads:
        return []
    largest = _norms(grads, math.inf, None, _one_kind(grads))
    home = largest[0].device
    flags = torch.isfinite(torch.stack([norm.to(home, torch.float32) for norm in largest]))
    values = cast("list[bool]", flags.tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
    return [name for name, is_finite in zip(names, values, strict=True) if not is_finite]


def largest_names(
    names: Sequence[str], grads: Sequence[Tensor], p: float, scale: Tensor | None, count: int
) -> list[tuple[str, float]]:
    """Return the *count* largest gradients, by p-norm, what is not finite first; one wait."""
    if not grads:
        return []
    norms = _norms(grads, p, scale, _one_kind(grads))
    home = norms[0].device
    stacked = torch.stack([norm.to(home, torch.float32) for norm in norms])
    values = cast("list[float]", stacked.tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
    ranked = sorted(
        zip(names, values, strict=True),
        key=lambda item: item[1] if math.isfinite(item[1]) else math.inf,
        reverse=True,
    )
    return ranked[:count]


def scale_in_place(grads: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiply *grads* by *coefficient*, 0-dim; of DTensors each rank does its own part."""
    groups: dict[_Kind, list[Tensor]] = {}
    for grad in grads:
        stored = grad if type(grad) is Tensor else _stored_part(grad)
        if stored.is_sparse:
            stored = stored._values()  # `values()` refuses what is not coalesced
        groups.setdefault((stored.device, stored.dtype), []).append(stored)
    for (device, _), members in groups.items():
        _torch._foreach_mul_(members, coefficient.to(device, non_blocking=True))


def _stored_part(grad: Tensor) -> Tensor:
    """Return the tensor in which this rank keeps its part; a sum over ranks scales by its parts."""
    from torch.distributed.tensor import DTensor

    return grad.to_local() if isinstance(grad, DTensor) else grad


def _norms(
    grads: Sequence[Tensor], p: float, scale: Tensor | None, kind: _Kind | None
) -> list[Tensor]:
    """Return one 0-dim norm per gradient, in order."""
    if kind is not None and (p != math.inf or all(grad.numel() for grad in grads)):
        return _dense_norms(grads, kind, p, scale)
    groups: dict[_Kind, list[tuple[int, Tensor]]] = {}
    shards: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    result: list[Tensor | None] = [None] * len(grads)
    for index, grad in enumerate(grads):
        local, sharding = (grad, None) if type(grad) is Tensor else local_shard(grad)
        if sharding is not None:
            shards.setdefault(sharding, []).append(index)
        if local.is_sparse:
            local = local.coalesce().values()
        if local.numel() == 0:  # the inf-norm of nothing is an error in torch
            wide = local.dtype in {torch.float64, torch.complex128}
            dtype = torch.float64 if wide else torch.float32
            result[index] = torch.zeros((), dtype=dtype, device=local.device)
        else:
            groups.setdefault((local.device, local.dtype), []).append((index, local))
    for kind, members in groups.items():
        norms = _dense_norms([grad for _, grad in members], kind, p, scale)
        for (index, _), norm in zip(members, norms, strict=True):
            result[index] = norm
    complete = [norm for norm in result if norm is not None]
    for (mesh, dims), indices in shards.items():
        reduced = _reduce_shards(torch.stack([complete[i] for i in indices]), mesh, dims, p)
        for index, norm in zip(indices, reduced.unbind(), strict=True):
            complete[index] = norm
    return complete


def _one_kind(grads: Sequence[Tensor]) -> _Kind | None:
    """Return device and dtype if all are plain, dense and alike: the usual case, kept cheap."""
    if not grads:
        return None
    # Once a step for every gradient, so the loops are those of `map`.
    if set(map(type, grads)) != {Tensor} or len(set(map(_dtype_of, grads))) > 1:
        return None
    # A device is made anew each time that a tensor is asked for it.
    if not all(map(_is_cpu, grads)) and len(set(map(_device_of, grads))) > 1:
        return None
    if any(map(_is_sparse, grads)):
        return None
    return grads[0].device, grads[0].dtype


class _Blocks(NamedTuple):
    """Gradients on the CPU, of one dtype; small ones are taken together, those of one size."""

    kind: _Kind
    single: list[Tensor]
    """Those that are measured as they are."""
    blocks: list[list[Tensor]]
    """The others: as many of one size as stay in the cache."""
    order: list[int]
    """Where each of them was in the list: single ones, then block after block."""

    @classmethod
    def of(cls, grads: Sequence[Tensor], kind: _Kind | None) -> _Blocks | None:
        """Collect *grads*; None where that saves nothing: elsewhere one kernel measures many tensors."""
        if kind is None or kind[0].type != "cpu":
            return None
        sizes: dict[int, list[int]] = {}
        for index, size in enumerate(map(Tensor.numel, grads)):
            sizes.setdefault(size if size < _SMALL else 0, []).append(index)
        alike = {size: found for size, found in sizes.items() if size and len(found) >= _FEW}
        if not alike:
            return None
        order = [i for size, found in sizes.items() if size not in alike for i in found]
        single = [grads[i] for i in order]
        blocks: list[list[Tensor]] = []
        for size, found in alike.items():
            rows = _BLOCK // size
            starts = range(0, len(found), rows)
            blocks += [[grads[i] for i in found[start : start + rows]] for start in starts]
            order += found
        return cls(kind, single, blocks, order)

    def norms(self, wanted: Collection[float], scale: Tensor | None) -> dict[float, Tensor]:
        """Norm type to the norms, 1-dim, in `order`."""
        parts: dict[float, list[Tensor]] = {p: [] for p in wanted}
        for p, found in parts.items():
            if self.single:
                found.append(torch.stack(_norms(self.single, p, None, self.kind)))
        for block in self.blocks:
            for found, norms in zip(parts.values(), _row_norms(block, parts), strict=True):
                found.append(norms)
        flat = {p: torch.cat(found) for p, found in parts.items()}
        if scale is None:
            return flat
        return {p: norms / scale.to(norms.device) for p, norms in flat.items()}

    def in_order(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """Return *norms*, which are in `order`, as the gradients were."""
        result = list(norms)
        for index, norm in zip(self.order, norms, strict=True):
            result[index] = norm
        return result


def _row_norms(block: Sequence[Tensor], wanted: Iterable[float]) -> list[Tensor]:
    """Return the norms of tensors of one size, 1-dim, for each norm type.

    The copy that this takes is gone before the next block's is made: the allocator has the same
    memory for all of them, and no page of it is new.
    """
    flat = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in block]
    matrix = torch.cat(flat).view(len(block), -1)
    wider = _wider(matrix.dtype)
    return [_torch.linalg.vector_norm(matrix, p, dim=1, dtype=wider) for p in wanted]


def _dense_norms(
    grads: Sequence[Tensor], kind: _Kind, p: float, scale: Tensor | None
) -> list[Tensor]:
    device, dtype = kind
    norms = _torch._foreach_norm(list(grads), p, dtype=_wider(dtype))
    if scale is not None:
        norms = _torch._foreach_div(norms, scale.to(device, non_blocking=True))
    return list(norms)


def _wider(dtype: torch.dtype) -> torch.dtype | None:
    """Return what to accumulate in: 16 bits overflow at 65504 (fp16) or keep 8 bits (bf16)."""
    return torch.float32 if dtype in {torch.float16, torch.bfloat16} else None


def _together(norms: Sequence[Tensor], device: torch.device, *, alike: bool) -> Tensor:
    """Return *norms* as one tensor, 1-dim, on *device*, in the widest of their dtypes."""
    if not norms:
        return torch.zeros(0, device=device)
    if not alike or norms[0].device != device:
        widest = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
        norms = [norm.to(device, widest, non_blocking=True) for norm in norms]
    return torch.stack(list(norms))


def _whole(norms: Tensor, p: float) -> Tensor:
    """Return the norm of *norms*: the norm over all the elements that they were taken of."""
    if norms.numel() == 0:  # of which the inf-norm is an error in torch
        return norms.sum()
    return _torch.linalg.vector_norm(norms, p)


def local_shard(grad: Tensor) -> tuple[Tensor, tuple[Any, tuple[int, ...]] | None]:
    """Return this rank's part of *grad*, and the mesh with those of its dimensions that shard it.

    The latter is None where the part is the whole. A collective if *grad* holds partial sums.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(grad, DTensor):
        return grad, None
    placements: list[Any] = [
        Replicate() if place.is_partial() else place for place in grad.placements
    ]
    if any(place.is_partial() for place in grad.placements):
        grad = grad.redistribute(placements=placements)
    mesh: Any = grad.device_mesh
    dims = tuple(
        dim
        for dim, place in enumerate(placements)
        if not place.is_replicate() and mesh.size(dim) > 1
    )
    return grad.to_local(), (mesh, dims) if dims else None


def _reduce_shards(norms: Tensor, mesh: Any, dims: tuple[int, ...], p: float) -> Tensor:
    """Return the norms of whole tensors from those of this rank's shards; one call per mesh dim."""
    import torch.distributed as dist

    if math.isinf(p):
        # MAX may drop a NaN (it depends on the backend); either way the norm is not finite.
        values, operation = (
            torch.nan_to_num(norms, nan=math.inf, posinf=math.inf),
            dist.ReduceOp.MAX,
        )
    else:
        values, operation = norms.double().pow(p), dist.ReduceOp.SUM
    for dim in dims:
        dist.all_reduce(values, op=operation, group=mesh.get_group(dim))
    return values if math.isinf(p) else values.pow(1 / p).to(norms.dtype)
