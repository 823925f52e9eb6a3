"""Counting non-finite losses and gradients where they are, and saying so in few words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from nshtrainer.runtime.gradient_norms import FiniteEvidence
from nshtrainer.runtime.gradients import GradientStep
from nshtrainer.runtime.step_metrics import fetch

__all__ = [
    "SCALER_PATIENCE",
    "LossRecord",
    "NonFiniteRecord",
    "Report",
    "Throttle",
    "has_scaler",
    "shorten",
]

SCALER_PATIENCE = 16
"""Consecutive non-finite steps after which a GradScaler is no longer searching: the scale, 65536
at first, has been halved to 1."""

_NAMES_SHOWN = 5


def shorten(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def has_scaler(trainer: Trainer) -> bool:
    """Whether a GradScaler is in use, for which non-finite gradients are how it finds its scale."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())


class Throttle:
    """Lets the 1st, 2nd, 4th, 8th ... occurrence through."""

    def __init__(self) -> None:
        self.seen = 0

    def allows(self) -> bool:
        """Count an occurrence; return whether it is to be reported."""
        self.seen += 1
        return self.seen & (self.seen - 1) == 0


class Report:
    """What one optimizer's record says.

    Args:
        count: Steps with non-finite gradients since the last report.
        longest: Most of them in a row, those before the last report included.
        first_step: `global_step` of the first one.
        names: Parameters concerned in the first one.
    """

    def __init__(self, count: int, longest: int, first_step: int, names: list[str]) -> None:
        self.count = count
        self.longest = longest
        self.first_step = first_step
        self.names = names


class LossRecord:
    """Non-finite losses, kept on the device until someone asks."""

    def __init__(self) -> None:
        self._in_step: Tensor | None = None
        self._count: Tensor | None = None
        self._first_step: Tensor | None = None

    def add(self, bad: Tensor, step: int) -> None:
        """Record one loss, at `global_step` *step*: *bad* is 0-dim; no host synchronization."""
        self._in_step = (
            bad if self._in_step is None else self._in_step | bad.to(self._in_step.device)
        )
        here = torch.full((), float(step), dtype=torch.float32, device=bad.device)
        if self._count is None or self._first_step is None:
            self._count, self._first_step = bad.float(), here
            return
        bad = bad.to(self._count.device)
        self._first_step = torch.where(self._count > 0, self._first_step, here.to(bad.device))
        self._count = self._count + bad

    def take_step(self) -> Tensor | None:
        """Return whether a loss since the last call was not finite; None if there was none."""
        bad, self._in_step = self._in_step, None
        return bad

    def take(self) -> tuple[int, int] | None:
        """Return how many were recorded since the last time, and the first one's step; None if none.

        Waits for the device.
        """
        if self._count is None or self._first_step is None:
            return None
        count, first_step = fetch([self._count, self._first_step])
        self._count = self._first_step = None
        return (int(count), int(first_step)) if count else None


class NonFiniteRecord:
    """Non-finite gradients of one optimizer, kept on the device until someone asks.

    The evidence of the first finding is kept, so the offenders can be named when the gradients are
    long gone.
    """

    def __init__(self) -> None:
        self._streak: Tensor | None = None
        self._clear()

    def add(self, step: GradientStep) -> None:
        """Record one step, whose norms were measured; no host synchronization."""
        norms = step.norms
        if norms is None or norms.finite is None or norms.evidence is None:
            return
        bad, evidence = ~norms.finite, norms.evidence
        none = torch.zeros((), device=bad.device)
        streak = torch.zeros_like(none) if self._streak is None else self._streak
        self._streak = torch.where(bad, streak + 1, 0.0)
        if self._count is None or self._longest is None:
            self._count, self._longest = bad.float(), self._streak
            self._first_step = torch.full_like(none, step.step).double()
            seen = torch.zeros_like(bad)
        else:
            seen = self._count > 0
            self._first_step = torch.where(seen, self._first_step, float(step.step))
            self._count = self._count + bad
            self._longest = torch.maximum(self._longest, self._streak)
        self._keep(evidence, seen)

    def _keep(self, evidence: FiniteEvidence, seen: Tensor) -> None:
        """Keep the newest evidence until one was *seen*: the first that is not finite stays."""
        layout = tuple(evidence.names)  # another where gradients are missing
        before = self._first.get(layout)
        kept = torch.zeros_like(evidence.values) if before is None else before.values
        values = torch.where(seen, kept, evidence.values)
        self._first[layout] = dataclasses.replace(evidence, values=values)

    def take(self) -> Report | None:
        """Return what was recorded since the last time, None if all was finite.

        Waits for the device.
        """
        if self._count is None or self._longest is None:
            return None
        count, longest, first_step = fetch([self._count, self._longest, self._first_step])
        first = self._first
        self._clear()
        if not count:
            return None
        names = [name for evidence in first.values() for name in evidence.non_finite()]
        return Report(int(count), int(longest), int(first_step), names)

    def _clear(self) -> None:
        self._count: Tensor | None = None
        self._longest: Tensor | None = None
        self._first: dict[Any, FiniteEvidence] = {}
        self._first_step: Tensor = torch.zeros(())
