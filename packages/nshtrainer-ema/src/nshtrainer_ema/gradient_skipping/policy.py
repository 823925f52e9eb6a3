"""The rule that says which gradient norms are skipped."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

__all__ = ["should_skip"]


@overload
def should_skip(norm: float, threshold: float | Tensor, *, skip_non_finite: bool) -> bool: ...


@overload
def should_skip(norm: Tensor, threshold: float | Tensor, *, skip_non_finite: bool) -> Tensor: ...


def should_skip(
    norm: float | Tensor, threshold: float | Tensor, *, skip_non_finite: bool
) -> bool | Tensor:
    """Decide whether a step with gradient norm *norm* is skipped.

    Args:
        norm: Gradient norm, a number or shape `()`, any float dtype.
        threshold: Largest finite norm that is applied, a number or shape `()`; `inf` applies all.
        skip_non_finite: Whether a NaN or Inf norm is skipped.

    Returns:
        Of a tensor: a boolean one of shape `()` on its device; no host synchronization.
    """
    if not isinstance(norm, Tensor):
        return bool(norm > threshold) if math.isfinite(norm) else skip_non_finite
    # Few kernels, as this is asked at each step; comparisons with NaN are false.
    if not skip_non_finite:
        return (norm > threshold) & (norm < math.inf)
    if isinstance(threshold, Tensor):
        return ~(norm <= threshold) | torch.isinf(norm)  # a limit that was learnt may be Inf
    return ~torch.isfinite(norm) if threshold == math.inf else ~(norm <= threshold)
