"""How a clause fails: with a message for the author of the callback, under `python -O` too."""

from __future__ import annotations

from nshtrainer.errors import NshTrainerError

__all__ = ["BrokenPromiseError", "promise"]


class BrokenPromiseError(NshTrainerError, AssertionError):
    """A config, callback or logger does not keep a promise of the conformance suite."""


def promise(kept: object, message: str) -> None:
    """Fail with *message* unless *kept*; the message says what happened and what to do.

    Raises:
        BrokenPromiseError: *kept* is false.
    """
    if not kept:
        raise BrokenPromiseError(message)
