"""One thread that writes checkpoints, one after the other, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Background"]


class Background:
    """Runs one job at a time; a second one waits until the first is done.

    The interpreter waits for a running job before it exits.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job was submitted whose end nobody has waited for."""
        return self._running is not None

    def submit(self, job: Callable[[], None]) -> None:
        """Start *job*; waits first for the one before, and raises what it raised."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="nshtrainer-checkpoint")
        self._running = self._pool.submit(job)

    def wait(self) -> None:
        """Wait for the job that runs, and raise what it raised; its error is raised once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait and end the thread; `submit` starts another one.

        Raises:
            Exception: What the last job raised, if nobody has heard of it.
        """
        try:
            self.wait()
        finally:
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.shutdown()

    def __getstate__(self) -> dict[str, Any]:
        return {"_pool": None, "_running": None}  # a spawned process has threads of its own
