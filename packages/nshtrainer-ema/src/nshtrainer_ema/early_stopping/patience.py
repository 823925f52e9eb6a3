"""How long a metric has not got better, in checks, optimizer steps or time; and what "better" is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from typing_extensions import override

from .config import PatienceUnit

__all__ = ["Moment", "TrainingClock", "Wait", "improves"]

_SECONDS: Final = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


def improves(
    value: Tensor, best: Tensor, *, mode: Literal["min", "max"], min_delta: float, relative: bool
) -> bool:
    """Whether *value* beats *best* by more than *min_delta*, or that fraction of the size of *best*.

    Both are 0-dim and on the host; the sum is formed in the dtype of *value*. Anything finite beats
    an infinite *best* of the worse side, and NaN beats nothing.
    """
    needed = 0.0
    if bool(torch.isfinite(best)):
        needed = min_delta * abs(float(best)) if relative else min_delta
    return bool(value + needed < best if mode == "min" else value - needed > best)


@dataclass(frozen=True)
class Moment:
    """When a check happens."""

    step: int
    """Optimizer steps so far."""
    seconds: float
    """Seconds spent training so far, in all runs."""


class TrainingClock:
    """Seconds spent training: counts only while it runs, and can be saved and continued.

    Args:
        now: A monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._counted = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._counted + (0.0 if self._since is None else self._now() - self._since)

    def run(self) -> None:
        """Count from now on."""
        self.pause()
        self._since = self._now()

    def pause(self) -> None:
        """Stop counting; nothing is lost."""
        self._counted, self._since = self.seconds, None

    def reset(self, counted: float) -> None:
        """Stop, and go on from *counted* seconds at the next `run`."""
        self._counted, self._since = counted, None


class Wait:
    """How long a metric has not got better, in one unit.

    Args:
        unit: What is counted.
    """

    def __init__(self, unit: PatienceUnit) -> None:
        self.unit: PatienceUnit = unit
        self._checks = 0
        self._since: Moment | None = None
        self._now = Moment(0, 0.0)

    @property
    def is_timed(self) -> bool:
        """Whether time is counted."""
        return self.unit in _SECONDS

    @property
    def waited(self) -> float:
        """How long, at the last check."""
        if self.unit == "checks":
            return self._checks
        since = self._since or self._now
        if self.unit == "steps":
            return self._now.step - since.step
        return (self._now.seconds - since.seconds) / _SECONDS[self.unit]

    def observe(self, now: Moment, checks: int) -> None:
        """Note a check *now*, the one of number *checks* in a row without a better value; 0 is better."""
        self._now, self._checks = now, checks
        if checks == 0 or self._since is None:
            self._since = now

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        state: dict[str, Any] = {"best_step": None if self._since is None else self._since.step}
        if self.is_timed:  # else two equal runs would have different states
            state["best_seconds"] = None if self._since is None else self._since.seconds
        return state

    def load_state_dict(self, state: Mapping[str, Any], seconds: float) -> None:
        """Go on from *state*; time that it does not tell begins at *seconds*."""
        step, at = state.get("best_step"), state.get("best_seconds")
        self._since = None
        if step is not None:
            self._since = Moment(int(step), seconds if at is None else float(at))

    @override
    def __str__(self) -> str:
        """Say how long, as in "3 checks" or "1.5 hours"."""
        amount = f"{round(self.waited, 1):g}"
        return f"{amount} {self.unit.removesuffix('s') if amount == '1' else self.unit}"
