"""Skips that only the device knows of, summed there until somebody fetches other numbers anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SkipCounts"]


def _plus(count: Tensor | None, flag: Tensor) -> Tensor:
    """Count one more where *flag*, of any dtype, is set; few kernels, as it is done at each step."""
    hit = flag if flag.dtype == torch.bool else flag != 0
    return hit.float() if count is None else count + hit


class SkipCounts:
    """Counts of skipped steps by reason; adding never waits for the device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._by_reason: dict[str, Tensor] = {}
        self._elsewhere = ""

    def add(self, skipped: Tensor, flags: list[tuple[str, Tensor]], elsewhere: str) -> None:
        """Count one step.

        Args:
            skipped: Whether it was skipped; 0-dim.
            flags: Each reason with its own flag.
            elsewhere: The reason to give if a step was skipped and none of *flags* was set.
        """
        self._elsewhere = elsewhere
        self._total = _plus(self._total, skipped)
        for reason, flag in flags:
            hit = flag.detach().reshape(()).to(skipped.device)
            self._by_reason[reason] = _plus(self._by_reason.get(reason), hit)

    def tensors(self) -> list[Tensor]:
        """Return the counts, total first, for `read`; empty if nothing was added."""
        return [] if self._total is None else [self._total, *self._by_reason.values()]

    def read(self, values: list[float]) -> tuple[int, tuple[str, ...]]:
        """Return total and reasons from the host's copy of `tensors`, and start from zero."""
        if self._total is None:
            return 0, ()
        reasons = [r for r, value in zip(self._by_reason, values[1:], strict=True) if value]
        total = round(values[0])
        if total and not reasons:
            reasons = [self._elsewhere]
        self._total, self._by_reason = None, {}
        return total, tuple(reasons)
