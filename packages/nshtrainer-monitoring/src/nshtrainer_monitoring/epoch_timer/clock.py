"""A stopwatch that can be paused, saved and continued."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Seconds for which it was running; a monotonic clock, so time changes do not matter.

    Args:
        now: Where the time comes from, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._counted = 0.0
        self._since: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds counted so far, those of the present run included."""
        return self._counted + (0.0 if self._since is None else self._now() - self._since)

    def run(self) -> None:
        """Count from now on; nothing happens if it counts already."""
        if self._since is None:
            self._since = self._now()

    def pause(self) -> None:
        """Stop counting, keep what was counted."""
        self._counted, self._since = self.elapsed, None

    def reset(self, counted: float = 0.0) -> None:
        """Stop, and start from *counted* seconds when it runs again."""
        self._counted, self._since = counted, None
