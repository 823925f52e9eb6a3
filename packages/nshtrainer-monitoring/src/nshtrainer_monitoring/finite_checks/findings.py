"""Counting non-finite losses and gradients where they are, and saying so in few words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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

_HELD = 64
"""Steps whose numbers are held at the most before they are looked at together."""


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
    """Losses until someone asks, looked at `_HELD` at a time: nothing is computed at each batch."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._steps: list[int] = []
        self._in_step: list[Tensor] = []
        self._is_bad: Callable[[Tensor], Tensor] = _not_finite
        self._count: Tensor | None = None
        self._first: Tensor | None = None
        """Position in `_steps`."""

    def add(self, loss: Tensor, step: int, *, nan_only: bool, decides: bool) -> None:
        """Record one *loss*, without autograd, at `global_step` *step*; no host synchronization.

        Args:
            loss: Of any shape.
            step: Where it was.
            nan_only: Whether Inf is none, as where a GradScaler scales the loss.
            decides: Whether `take_step` will ask for it.
        """
        self._is_bad = torch.isnan if nan_only else _not_finite
        if decides:
            self._in_step.append(loss)
        self._held.append(loss)
        self._steps.append(step)
        if len(self._held) >= _HELD:
            self._fold()

    def take_step(self) -> Tensor | None:
        """Return whether a loss since the last call was not finite; None if there was none."""
        losses, self._in_step = self._in_step, []
        return self._flags(losses).any() if losses else None

    def take(self) -> tuple[int, int] | None:
        """Return how many were recorded since the last time, and the first one's step; None if none.

        Waits for the device.
        """
        self._fold()
        if self._count is None or self._first is None:
            return None
        count, first = fetch([self._count, self._first])
        steps, self._steps = self._steps, []
        self._count = self._first = None
        return (int(count), steps[int(first)]) if count else None

    def _flags(self, losses: list[Tensor]) -> Tensor:
        home = losses[0].device
        if all([loss.dim() == 0 and loss.device == home for loss in losses]):  # noqa: C419 -- a list is made in half the time
            return self._is_bad(torch.stack(losses))
        return torch.stack([self._is_bad(loss).any().to(home) for loss in losses])

    def _fold(self) -> None:
        if not self._held:
            return
        flags = self._flags(self._held)
        first = _first_of(flags) + (len(self._steps) - len(self._held))
        self._held = []
        if self._count is None or self._first is None:
            self._count, self._first = flags.sum(), first
            return
        flags = flags.to(self._count.device)
        self._first = torch.where(self._count > 0, self._first, first.to(flags.device))
        self._count = self._count + flags.sum()


class NonFiniteRecord:
    """Whether gradients of one optimizer were finite, until someone asks.

    Nothing is computed at each step: what was measured is held, for `_HELD` steps at the most, and
    looked at together. The evidence of the first finding is kept, so the offenders can be named when
    the gradients are long gone.
    """

    def __init__(self) -> None:
        self._streak: Tensor | None = None
        self._held: list[tuple[Tensor, FiniteEvidence]] = []
        self._clear()

    def add(self, step: GradientStep) -> None:
        """Record one step, whose norms were measured; no host synchronization."""
        norms = step.norms
        if norms is None or norms.finite is None or norms.evidence is None:
            return
        evidence = norms.evidence
        if self._held and self._held[-1][1].names != evidence.names:
            self._fold()  # gradients are missing that were there, or the other way round
        self._held.append((norms.finite, evidence))
        self._steps.append(step.step)
        if len(self._held) >= _HELD:
            self._fold()

    def take(self) -> Report | None:
        """Return what was recorded since the last time, None if all was finite.

        Waits for the device.
        """
        self._fold()
        if self._count is None or self._longest is None or self._first is None:
            return None
        count, longest, first = fetch([self._count, self._longest, self._first])
        kept, steps = self._kept, self._steps
        self._clear()
        if not count:
            return None
        names = [name for evidence in kept.values() for name in evidence.non_finite()]
        return Report(int(count), int(longest), steps[int(first)], names)

    def _fold(self) -> None:
        """Look at the steps that are held, on the device; all have one layout."""
        if not self._held:
            return
        finite, evidence = zip(*self._held, strict=True)
        self._held = []
        bad = ~torch.stack(finite)
        seen = torch.zeros_like(bad[0]) if self._count is None else self._count > 0
        self._keep(evidence, bad, seen)
        first = _first_of(bad) + (len(self._steps) - len(finite))
        self._first = first if self._first is None else torch.where(seen, self._first, first)
        count = bad.sum()
        self._count = count if self._count is None else self._count + count
        streaks = _streaks(bad, self._streak)
        self._streak = streaks[-1]
        longest = streaks.max()
        self._longest = longest if self._longest is None else torch.maximum(self._longest, longest)

    def _keep(self, evidence: Sequence[FiniteEvidence], bad: Tensor, seen: Tensor) -> None:
        """Keep the evidence of the first step that was not finite, as long as none was *seen*."""
        values = torch.stack([one.values for one in evidence])
        values = values.index_select(0, _first_of(bad).reshape(1).to(values.device))[0]
        layout = tuple(evidence[0].names)
        known = self._kept.get(layout)
        kept = torch.zeros_like(values) if known is None else known.values
        values = torch.where(seen.to(values.device), kept, values)
        self._kept[layout] = dataclasses.replace(evidence[0], values=values)

    def _clear(self) -> None:
        self._count: Tensor | None = None
        self._longest: Tensor | None = None
        self._kept: dict[Any, FiniteEvidence] = {}
        self._steps: list[int] = []
        self._first: Tensor | None = None
        """Position in `_steps`."""


def _not_finite(values: Tensor) -> Tensor:
    return ~torch.isfinite(values)


def _first_of(flags: Tensor) -> Tensor:
    """The position of the first of *flags* that is set, or 0 if none is; 0-dim."""
    return flags.byte().argmax()


def _streaks(flags: Tensor, before: Tensor | None) -> Tensor:
    """How many of *flags* are set in a row, up to each; *before* is the streak that they go on from."""
    count = flags.cumsum(0)
    broken = torch.where(flags, torch.zeros_like(count), count).cummax(0).values
    streaks = count - broken
    if before is None:
        return streaks
    unbroken = (~flags).cumsum(0) == 0
    return torch.where(unbroken, streaks + before, streaks)
