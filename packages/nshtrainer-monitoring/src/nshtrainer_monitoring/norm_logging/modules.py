"""Norms of modules, made of the norms of their parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ModuleNorms", "modules_of", "on_one_device"]


def modules_of(name: str, depth: int) -> list[str]:
    """Return the modules that the parameter *name* lies in, outermost first, at most *depth*."""
    path = name.split(".")[:-1]
    return [".".join(path[:length]) for length in range(1, min(depth, len(path)) + 1)]


def on_one_device(norms: Iterable[Tensor]) -> Tensor:
    """Return 0-dim *norms*, at least one, as a vector on the device of the first, in fp64 if it can."""
    each = list(norms)
    home = each[0].device
    dtype = torch.float32 if home.type == "mps" else torch.float64
    if all(norm.device == home and norm.dtype is each[0].dtype for norm in each):
        return torch.stack(each).to(dtype)
    return torch.stack([norm.to(home, dtype, non_blocking=True) for norm in each])


@dataclass(frozen=True)
class _Layout:
    """Which norm counts for which module: pairs of positions, on the device."""

    names: tuple[str, ...]
    modules: list[str]
    members: Tensor
    owners: Tensor


class ModuleNorms:
    """Adds up norms of parameters by module.

    Args:
        depth: How deep modules are looked into.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._layouts: dict[tuple[str, torch.device], _Layout] = {}

    def of(self, what: str, norms: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
        """Return module name to p-norm over its parameters; no host synchronization.

        Args:
            what: Says which layout to keep: the names are usually those of the last call.
            norms: Parameter name to p-norm, 0-dim.
            p: The norm type.
        """
        if not norms:
            return {}
        vector = on_one_device(norms.values())
        layout = self._layout(what, tuple(norms), vector.device)
        if not layout.modules:
            return {}
        each = vector.index_select(0, layout.members)
        total = torch.zeros(len(layout.modules), dtype=vector.dtype, device=vector.device)
        if math.isinf(p):
            # As between shards: a maximum may drop a NaN, and an Inf says as much.
            each = torch.nan_to_num(each, nan=math.inf, posinf=math.inf)
            total = total.scatter_reduce(0, layout.owners, each, "amax")
        else:
            total = total.index_add(0, layout.owners, each.pow(p)).pow(1 / p)
        return dict(zip(layout.modules, total.unbind(), strict=True))

    def _layout(self, what: str, names: tuple[str, ...], device: torch.device) -> _Layout:
        known = self._layouts.get((what, device))
        if known is not None and known.names == names:
            return known
        positions: dict[str, int] = {}
        pairs = [
            (member, positions.setdefault(module, len(positions)))
            for member, name in enumerate(names)
            for module in modules_of(name, self._depth)
        ]
        layout = _Layout(
            names,
            list(positions),
            torch.tensor([member for member, _ in pairs], dtype=torch.long, device=device),
            torch.tensor([owner for _, owner in pairs], dtype=torch.long, device=device),
        )
        self._layouts[what, device] = layout
        return layout
