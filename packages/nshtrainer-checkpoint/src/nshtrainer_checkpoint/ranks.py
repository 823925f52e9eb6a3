"""Deciding on one rank for all, and acting on one rank without the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nshtrainer.errors import NshTrainerError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["agree", "no_barrier"]

T = TypeVar("T")


def agree(trainer: Trainer, decide: Callable[[], T]) -> T:
    """Call *decide* on rank 0 and return its result on every rank; a collective.

    Raises:
        Exception: What *decide* raised, on rank 0.
        NshTrainerError: That it raised, on the others, so that none of them waits.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = decide()
        except Exception as raised:  # noqa: BLE001 -- raised again below, after the others know
            error = raised
    text = None if error is None else f"{type(error).__name__}: {error}"
    result, text = trainer.strategy.broadcast((result, text))
    if error is not None:
        raise error
    if text is not None:
        raise NshTrainerError(f"rank 0 could not save a checkpoint: {text}")
    return cast("T", result)


@contextlib.contextmanager
def no_barrier(trainer: Trainer) -> Generator[None]:
    """Let one rank save by itself: the others will never reach a barrier."""
    strategy: Any = trainer.strategy
    before = strategy.__dict__.get("barrier")
    strategy.barrier = _pass
    try:
        yield
    finally:
        if before is None:
            del strategy.barrier
        else:
            strategy.barrier = before


def _pass(*_args: Any, **_kwargs: Any) -> None:
    """Wait for nobody."""
