"""A tensor's distribution in the form that W&B shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from wandb import Histogram

__all__ = ["bin_counts", "histogram"]

_BINS: Final = 64


def bin_counts(values: Tensor, bins: int = _BINS) -> tuple[Tensor, Tensor] | None:
    """Count the finite entries of *values* in *bins* bins of one width.

    Args:
        values: Any shape, dtype and device; of a sharded one, this rank's part. Read only.
        bins: Number of bins; equal entries get a single one.

    Returns:
        Counts, and their edges (one more), on the CPU; None without a finite entry. Waits for the
        device.
    """
    local = values.to_local() if isinstance(values, DTensor) else values
    flat = local.detach().reshape(-1).float()
    flat = flat[torch.isfinite(flat)]
    if flat.numel() == 0:
        return None
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        return torch.tensor([float(flat.numel())]), torch.tensor([low, high])
    counts = torch.histc(flat, bins=bins, min=low, max=high)
    return counts.cpu(), torch.linspace(low, high, bins + 1)


def histogram(values: Tensor) -> Histogram | None:
    """Return `bin_counts` of *values* as W&B's histogram."""
    from wandb import Histogram

    if (counted := bin_counts(values)) is None:
        return None
    counts, edges = counted
    return Histogram(np_histogram=(counts.numpy(), edges.numpy()))
