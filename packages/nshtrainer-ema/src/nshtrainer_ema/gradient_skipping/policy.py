"""The rule that says which gradient norms are skipped."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["should_skip"]


def should_skip(norm: Tensor, threshold: float | Tensor, *, skip_non_finite: bool) -> Tensor:
    """Decide whether a step with gradient norm *norm* is skipped.

    Args:
        norm: Gradient norm, shape `()`, any float dtype.
        threshold: Largest finite norm that is applied, a number or shape `()`; `inf` applies all.
        skip_non_finite: Whether a NaN or Inf norm is skipped.

    Returns:
        Boolean tensor of shape `()` on the device of *norm*; no host synchronization.
    """
    is_finite = torch.isfinite(norm)
    is_over = is_finite & (norm > threshold)
    return is_over | ~is_finite if skip_non_finite else is_over
