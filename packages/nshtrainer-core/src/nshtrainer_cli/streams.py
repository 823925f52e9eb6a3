"""stdout and stderr that cannot be written to: one line and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["say", "with_output"]


class _Closed(io.TextIOBase):
    """Stands for a stdout that the caller closed (`>&-`), so that a lost result is noticed."""

    encoding = "utf-8"
    errors = "strict"

    def writable(self) -> bool:  # pyright: ignore[reportImplicitOverride] -- typing.override is newer than Python 3.10
        return True

    def write(self, s: str, /) -> int:  # pyright: ignore[reportImplicitOverride] -- as above
        del s
        raise OSError(errno.EBADF, "it is closed")


def with_output(run: Callable[[], int]) -> int:
    """Return what *run* returns, or 1 if what it printed got lost; stderr says so where it can.

    A pipe whose reader has seen enough is no news to anyone, and nothing is said.
    """
    if _stream("stdout") is None:
        sys.stdout = _Closed()
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not _takes_a_line("stdout"):
            _drop("stdout")
            if error.errno != errno.EPIPE:
                reason = error.strerror or str(error)
                say(f"Error: stdout cannot be written to: {reason}; send the output elsewhere")
        elif not _takes_a_line("stderr"):
            _drop("stderr")
        else:
            raise  # it is about something else
        return 1


def say(line: str) -> None:
    """Write *line* to stderr, if there is one that takes it."""
    if not _takes_a_line("stderr", line):
        _drop("stderr")


def _stream(name: str) -> Any:
    """The stream; None, which its type does not tell, if it was closed before Python started."""
    return getattr(sys, name)


def _takes_a_line(name: str, line: str = "") -> bool:
    """Write *line* and tell whether that worked: an error does not say which file it is about."""
    stream = _stream(name)
    try:
        if stream is not None:
            stream.write(f"{line}\n")
            stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _drop(name: str) -> None:
    """Let what waits to be written go to nowhere, else Python fails once more when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _stream(name).fileno())
        os.close(nowhere)
