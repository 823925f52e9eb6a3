"""The arithmetic of the average: one step of it, for many tensors at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["update_average"]

# Private in torch; there is no public form of the foreach functions.
_torch: Any = torch

_PIECE = 1 << 22
"""How many elements are cast to the average's dtype at a time: 16 MiB in fp32."""


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
    pairs = list(zip(average, source, strict=True))
    alike = [(a, s) for a, s in pairs if a.dtype == s.dtype and a.device == s.device]
    _lerp(alike, 1 - decay, where)
    if len(alike) < len(pairs):
        others = [(a, s) for a, s in pairs if a.dtype != s.dtype or a.device != s.device]
        for piece in _pieces(others):
            _lerp([(a, s.to(a.device, a.dtype)) for a, s in piece], 1 - decay, where)


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


def _lerp(pairs: list[tuple[Tensor, Tensor]], weight: float | Tensor, where: Tensor | None) -> None:
    if not pairs:
        return
    average, source = [a for a, _ in pairs], [s for _, s in pairs]
    if where is None and not isinstance(weight, Tensor):
        _torch._foreach_lerp_(average, source, weight)
        return
    # One tensor for each pair: a single one would be read by the host.
    kinds = {(a.device, a.dtype) for a in average}
    weights = {kind: _on(weight, where, *kind) for kind in kinds}
    _torch._foreach_lerp_(average, source, [weights[a.device, a.dtype] for a in average])


def _on(
    weight: float | Tensor, where: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | float:
    if isinstance(weight, Tensor):
        weight = weight.to(device, dtype)
    return weight if where is None else where.to(device, dtype) * weight
