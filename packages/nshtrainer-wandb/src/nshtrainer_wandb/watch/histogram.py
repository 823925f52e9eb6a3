"""Histograms of many tensors at once: on the device, with few kernels and one transfer to the host.

Tensors are cut into pieces, and pieces joined to pools of a fixed size, so neither the number of
tensors nor the size of one matters: each pool is read twice, first for the range of every tensor,
then to count. What is needed beside the tensors is a few times the size of a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nshtrainer.runtime.gradient_norms import local_shard

__all__ = ["BINS", "Histogram", "count_histograms", "is_sharded"]

BINS: Final = 64
"""As many as `wandb.watch` has."""

_POOL: Final = 1 << 22
"""Elements of a pool."""
_POOL_ON_CPU: Final = 1 << 17
"""The same, so that it stays in the cache."""


class Histogram(NamedTuple):
    """How the finite elements of one tensor are distributed."""

    counts: list[float]
    """Elements in each bin."""
    edges: list[float]
    """Of bins of one width, from the smallest to the largest element; one more than counts."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of *tensor*, so that counting it takes all of them."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


@torch.no_grad()
def count_histograms(
    tensors: Mapping[str, Tensor], bins: int = BINS, *, fetch: bool = True
) -> dict[str, Histogram]:
    """Count the finite elements of each tensor in *bins* bins between its own extremes.

    Args:
        tensors: Name to a tensor of any shape, dtype and device, sharded (DTensor) or not; read
            only. What is computed is fp32.
        bins: Number of bins; a tensor of equal elements gets a single one.
        fetch: Whether to bring them to the host. Ranks that only take part leave it out.

    Returns:
        Those that have a finite element; nothing without *fetch*.

    Waits once per device, for everything. A collective where tensors are sharded: every rank calls
    it with the same ones.
    """
    by_device: dict[torch.device, list[_Source]] = {}
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        local, sharding = (tensor, None) if plain else local_shard(tensor)
        source = _Source(name, _flat(local.detach()), sharding)
        by_device.setdefault(local.device, []).append(source)
    found: dict[str, Histogram] = {}
    for device, sources in by_device.items():
        counted = _count(sources, bins, device)
        if fetch:
            found.update(_read([source.name for source in sources], counted, bins))
    return {name: found[name] for name in tensors if name in found}


class _Source(NamedTuple):
    name: str
    values: Tensor
    """1-dim; this rank's part."""
    sharding: tuple[Any, tuple[int, ...]] | None
    """The mesh, and those of its dimensions that the tensor is spread over."""


@dataclass
class _Pool:
    """Pieces of tensors that are looked at together."""

    pieces: list[Tensor]
    owners: list[int]
    """Which tensor each piece is of."""

    def joined(self) -> Tensor:
        return torch.cat(self.pieces).float()

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The owners and lengths of the pieces as tensors."""
        lengths = [piece.numel() for piece in self.pieces]
        return torch.tensor(self.owners, device=device), torch.tensor(lengths, device=device)


def _flat(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.reshape(-1)


def _pools(sources: list[_Source], limit: int) -> Iterator[_Pool]:
    pool, size = _Pool([], []), 0
    for owner, source in enumerate(sources):
        pieces: tuple[Tensor, ...] = torch.split(source.values, limit)
        for piece in pieces:
            if size + piece.numel() > limit and pool.pieces:
                yield pool
                pool, size = _Pool([], []), 0
            pool.pieces.append(piece)
            pool.owners.append(owner)
            size += piece.numel()
    if pool.pieces:
        yield pool


def _count(sources: list[_Source], bins: int, device: torch.device) -> Tensor:
    """Return lowest, highest and counts of each tensor, shape `(len(sources), 2 + bins)`."""
    low = torch.full((len(sources),), torch.inf, device=device)
    high = torch.full((len(sources),), -torch.inf, device=device)
    pools = list(_pools(sources, _POOL_ON_CPU if device.type == "cpu" else _POOL))
    for pool in pools:
        _widen(low, high, pool)
    shards = _shards_of(sources)
    _reduce(low, shards, dist.ReduceOp.MIN)
    _reduce(high, shards, dist.ReduceOp.MAX)
    counts = torch.zeros(len(sources) * bins, dtype=torch.int32, device=device)
    for pool in pools:
        _add_counts(counts, pool, low, high, bins)
    counts = counts.reshape(len(sources), bins)
    _reduce(counts, shards, dist.ReduceOp.SUM)
    wide = torch.float32 if device.type == "mps" else torch.float64  # counts of fp32 end at 2**24
    return torch.cat([low.to(wide)[:, None], high.to(wide)[:, None], counts.to(wide)], dim=1)


def _widen(low: Tensor, high: Tensor, pool: _Pool) -> None:
    """Let *low* and *high* span the finite elements of *pool*, too."""
    values = pool.joined()
    owners, lengths = pool.on(values.device)
    is_finite = values.isfinite()
    for extreme, start, what in ((low, torch.inf, "min"), (high, -torch.inf, "max")):
        # Not checked ("unsafe"), since that would wait for the device.
        ends = torch.segment_reduce(
            values.where(is_finite, start), what, lengths=lengths, unsafe=True, initial=start
        )
        extreme.scatter_reduce_(0, owners, ends, f"a{what}")


def _add_counts(counts: Tensor, pool: _Pool, low: Tensor, high: Tensor, bins: int) -> None:
    values = pool.joined()
    owners, lengths = pool.on(values.device)
    is_finite = values.isfinite()

    def spread(of_pieces: Tensor) -> Tensor:
        return of_pieces.repeat_interleave(lengths, output_size=values.numel())

    start, width = low[owners], (high - low)[owners]
    # Where all are equal this is 0/0, and beyond half of fp32's range inf/inf.
    part = values.sub_(spread(start)).div_(spread(width)).nan_to_num_(0.0, 0.0, 0.0)
    index = part.mul_(bins).long().clamp_(0, bins - 1).add_(spread(owners * bins))
    # Integers: in any order their sum is the same. `histc` may not be used by deterministic runs.
    counts.scatter_add_(0, index, is_finite.to(counts.dtype))


def _shards_of(sources: list[_Source]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    shards: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, source in enumerate(sources):
        if source.sharding is not None:
            shards.setdefault(source.sharding, []).append(index)
    return shards


def _reduce(
    values: Tensor, shards: Mapping[tuple[Any, tuple[int, ...]], list[int]], operation: Any
) -> None:
    """Combine the rows of sharded tensors over the ranks, in place; one call per mesh dimension."""
    for (mesh, dims), rows in shards.items():
        index = torch.tensor(rows, device=values.device)
        part = values[index]
        for dim in dims:
            dist.all_reduce(part, op=operation, group=mesh.get_group(dim))
        values[index] = part


def _read(names: list[str], counted: Tensor, bins: int) -> Iterator[tuple[str, Histogram]]:
    """Fetch what was counted, in one transfer."""
    host = counted.cpu()
    low, high = host[:, :1], host[:, 1:2]
    edges = torch.lerp(low, high, torch.linspace(0, 1, bins + 1, dtype=host.dtype))
    rows = zip(names, _lists(host[:, 2:]), _lists(edges), strict=True)
    for name, counts, borders in rows:
        first, last = borders[0], borders[-1]
        if first == last:
            yield name, Histogram([sum(counts)], [first, last])
        elif any(counts):
            yield name, Histogram(counts, borders)


def _lists(rows: Tensor) -> list[list[float]]:
    return cast("list[list[float]]", rows.tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
