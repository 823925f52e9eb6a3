"""Keeps Lightning's callback factories away from a trainer that resolves its own callbacks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

__all__ = ["factories_are_off", "without_factories"]

_off: ContextVar[bool] = ContextVar("nshtrainer_without_factories", default=False)


def factories_are_off() -> bool:
    """Whether our factory must return nothing."""
    return _off.get()


@contextlib.contextmanager
def without_factories() -> Generator[None]:
    """Our Trainer is being built: callbacks of `NSHTRAINER_CALLBACKS` are for plain ones."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)
