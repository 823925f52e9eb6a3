"""Norms of gradients: one fused pass, in at least fp32, right for sharded tensors, on the device.

Per tensor first, then a total from those norms, so asking for both costs one read of the
gradients. On the CPU small gradients are collected for a total: a call for each costs more than
what it does. Nothing here waits for the device, except what returns names.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

# Untyped or private in torch's stubs; there is no public form of the foreach functions.
_torch: Any = torch

_Kind: TypeAlias = tuple[torch.device, torch.dtype]

_SMALL: Final = 1 << 11
"""Elements; below it, a gradient on the CPU is collected with others."""
_POOL: Final = 1 << 17
"""Elements that are collected at a time, so that they are still in the cache."""

_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")
_is_sparse = attrgetter("is_sparse")

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
    counts: Sequence[int]
    """How many of `values` belong to each."""
    values: Tensor
    """1-dim, fp32 or wider: the norm of each large gradient, and small ones as they are."""

    @property
    def layout(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """What two pieces of evidence have in common whose `values` stand for the same things."""
        return tuple(self.names), tuple(self.counts)

    def non_finite(self) -> list[str]:
        """Return the names of those that are not finite; waits for the device.

        A norm that overflowed reads as not finite.
        """
        if not self.names:
            return []
        is_finite = torch.isfinite(self.values)
        if any(count != 1 for count in self.counts):
            parts = torch.split(is_finite, list(self.counts))
            is_finite = torch.stack([part.all() for part in parts])
        flags = cast("list[bool]", is_finite.tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
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
    each: dict[float, list[Tensor]] = {}
    whole: dict[float, Tensor] = {}
    kept: FiniteEvidence | None = None
    pooled = _pooled(grads) if _can_pool(kind) and (totals or finite) else None
    for p in sorted(wanted):
        is_total, is_each = p in totals or p == checked, p in per_parameter
        if pooled is None:
            each[p] = parts = _norms(grads, p, scale, kind)
        elif not is_each:
            parts = _norms([grads[i] for i in pooled.large] + pooled.pools, p, scale, kind)
        else:
            # Small ones twice, so that a total is the same number whatever is asked beside it.
            parts = _norms([*grads, *pooled.pools], p, scale, kind)
            each[p] = parts[: len(grads)]
            parts = [parts[i] for i in pooled.large] + parts[len(grads) :]
        if is_total:
            whole[p] = _combine(parts, p, device, alike=kind is not None)
        if evidence and p == checked:
            kept = _evidence(names, parts, pooled, device)
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
                whole[key][p] = _combine(each[key][p], p, device, alike=kind is not None)
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
    if len(set(map(_device_of, grads))) > 1 or any(map(_is_sparse, grads)):
        return None
    return grads[0].device, grads[0].dtype


class _Pooled(NamedTuple):
    large: list[int]
    """Positions of gradients that are measured as they are."""
    small: list[int]
    """Those of the others."""
    counts: list[int]
    """How many elements each of these has."""
    pools: list[Tensor]
    """These, many to a tensor."""


def _can_pool(kind: _Kind | None) -> bool:
    """Whether small gradients are better collected; elsewhere one kernel measures many tensors."""
    return kind is not None and kind[0].type == "cpu"


def _pooled(grads: Sequence[Tensor]) -> _Pooled:
    """Collect small gradients: a norm of their elements is one of their norms."""
    large: list[int] = []
    small: list[int] = []
    counts: list[int] = []
    pools: list[Tensor] = []
    pool: list[Tensor] = []
    size = 0
    for index, count in enumerate(map(Tensor.numel, grads)):
        if count >= _SMALL:
            large.append(index)
            continue
        small.append(index)
        counts.append(count)
        grad = grads[index]
        pool.append(grad if grad.dim() == 1 else grad.reshape(-1))
        size += count
        if size >= _POOL:
            pools.append(torch.cat(pool))
            pool, size = [], 0
    if pool:
        pools.append(torch.cat(pool))
    return _Pooled(large, small, counts, pools)


def _evidence(
    names: Sequence[str], norms: Sequence[Tensor], pooled: _Pooled | None, device: torch.device
) -> FiniteEvidence:
    """Keep what *norms*, those of the total, were taken of, as far as it is small."""
    if not norms:
        return FiniteEvidence([], [], torch.zeros(0, device=device))
    if pooled is None:
        wide = [norm.to(device, non_blocking=True) for norm in norms]
        return FiniteEvidence(names, [1] * len(names), torch.stack(_promoted(wide)))
    large = norms[: len(pooled.large)]
    parts = [*([torch.stack(list(large))] if large else []), *pooled.pools]
    kept = [names[i] for i in (*pooled.large, *pooled.small)]
    counts = [1] * len(large) + pooled.counts
    return FiniteEvidence(kept, counts, torch.cat(_promoted(parts)))


def _promoted(tensors: list[Tensor]) -> list[Tensor]:
    """Return *tensors* in the widest of their dtypes, at least fp32."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return [tensor.to(widest) for tensor in tensors]


def _dense_norms(
    grads: Sequence[Tensor], kind: _Kind, p: float, scale: Tensor | None
) -> list[Tensor]:
    device, dtype = kind
    # 16-bit accumulation overflows at 65504 (fp16) or keeps 8 bits (bf16).
    wider = torch.float32 if dtype in {torch.float16, torch.bfloat16} else None
    norms = _torch._foreach_norm(list(grads), p, dtype=wider)
    if scale is not None:
        norms = _torch._foreach_div(norms, scale.to(device, non_blocking=True))
    return list(norms)


def _combine(norms: Sequence[Tensor], p: float, device: torch.device, *, alike: bool) -> Tensor:
    """Return the norm of *norms*: the norm over all the elements that they were taken of."""
    if not norms:
        return torch.zeros((), device=device)
    if not alike or norms[0].device != device:
        widest = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
        norms = [norm.to(device, widest, non_blocking=True) for norm in norms]
    return _torch.linalg.vector_norm(torch.stack(list(norms)), p)


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
