"""How far training is, in epochs."""

from __future__ import annotations

import math

__all__ = ["epoch_fraction"]


def epoch_fraction(epoch: int, processed: int, batches: float) -> float:
    """Return the epochs done: complete ones and a fraction of the present one.

    Args:
        epoch: Complete epochs.
        processed: Batches of the present epoch that were processed.
        batches: Batches per epoch; `inf` where the length is not known, which counts whole
            epochs only.
    """
    if not batches or math.isinf(batches):
        return float(epoch)
    return epoch + min(1.0, processed / batches)
