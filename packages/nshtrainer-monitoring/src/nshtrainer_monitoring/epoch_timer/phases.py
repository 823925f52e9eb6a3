"""Where the time of training steps goes: every moment counts for exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias

__all__ = ["PHASES", "Phase", "PhaseClock"]

Phase: TypeAlias = Literal["data", "forward", "backward", "optimizer", "callbacks", "other"]

PHASES: Final[tuple[Phase, ...]] = (
    "data", "forward", "backward", "optimizer", "callbacks", "other",
)  # fmt: skip


class PhaseClock:
    """Counts the seconds of each phase; phases may lie inside one another.

    Args:
        now: Where the time comes from, in seconds; a monotonic clock.
        settle: Called before the clock is read; waits for the device, if that is wanted.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        settle: Callable[[], object] | None = None,
    ) -> None:
        self._now = now
        self.settle = settle
        self.phase: Phase | None = None
        """What is counted now; None is nothing."""
        self._since = 0.0
        self._lap: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._total: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: Phase | None) -> Phase | None:
        """Count for *phase* from now on, or for none; return the one until now."""
        if self.settle is not None:
            self.settle()
        now = self._now()
        before = self.phase
        if before is not None:
            self._lap[before] += now - self._since
            self._total[before] += now - self._since
        self.phase, self._since = phase, now
        return before

    def lap(self) -> dict[Phase, float]:
        """Return the seconds of each phase since the last call."""
        self.enter(self.phase)
        lap = self._lap
        self._lap = dict.fromkeys(PHASES, 0.0)
        return lap

    def total(self) -> dict[Phase, float]:
        """Return the seconds of each phase since the last reset."""
        self.enter(self.phase)
        return dict(self._total)

    def reset(self, total: Mapping[Phase, float] | None = None) -> None:
        """Start the total anew, from *total* or from nothing; the lap goes on."""
        self.enter(self.phase)
        self._total = dict.fromkeys(PHASES, 0.0)
        for phase in PHASES:
            if total is not None and phase in total:
                self._total[phase] = float(total[phase])
