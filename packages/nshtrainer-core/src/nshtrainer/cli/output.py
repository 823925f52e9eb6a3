"""Where commands write: results to stdout or a file, all else to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from pathlib import Path

import click

from nshtrainer.errors import NshTrainerError

__all__ = ["OutputError", "plugins_print_to_stderr", "write_result"]


class OutputError(NshTrainerError, OSError):
    """A result cannot be written."""


@contextlib.contextmanager
def plugins_print_to_stderr() -> Generator[None]:
    """Keep what a plugin prints while it is imported out of a result on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def write_result(text: str, out: Path | None) -> None:
    """Write *text* to the file *out*, replaced as a whole, or to stdout.

    Raises:
        OutputError: *out* cannot be written.
    """
    if out is None:
        click.echo(text, nl=False)
        return
    from nshtrainer.files import atomic_write_text

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, text)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {_reason(error)}; choose another file"
        ) from error
    click.echo(f"wrote {out}", err=True)


def _reason(error: OSError) -> str:
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
        return f"{os.fsdecode(error.filename)} is no folder"
    return (error.strerror or str(error)).partition(";")[0]  # what is behind it is advice
