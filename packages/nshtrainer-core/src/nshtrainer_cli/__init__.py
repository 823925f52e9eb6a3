"""The command `nshtrainer`, as far as the standard library carries it.

`doctor` must run where one malformed distribution keeps pydantic, and with it nshtrainer, from being
imported. So the command starts in this package, which imports neither.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from .streams import say, with_output

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: What follows the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status of `doctor`, or 1 if the output got lost; else a command ends with `SystemExit`.
    """
    given = list(sys.argv[1:] if args is None else args)
    return with_output(lambda: _run(given))


def _run(given: list[str]) -> int:
    if given[:1] == ["doctor"]:
        from .doctor import main as doctor

        return doctor(given[1:])
    _speak_plainly()
    try:
        from nshtrainer.cli import main as run
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever it is, doctor finds out why
        say(
            f"nshtrainer cannot be imported: {type(error).__name__}: {error}\n"
            f"The reason is in this environment; run `nshtrainer doctor` to see which package it is."
        )
        return 1
    run(given)
    return 0


def _speak_plainly() -> None:
    """Warnings and log records are one line each on stderr, without source lines and tracebacks."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, line, file
        say(f"warning: {message}")

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:  # pyright: ignore[reportImplicitOverride] -- typing.override is newer than Python 3.10
            plain = copy.copy(record)
            plain.levelname = record.levelname.lower()
            plain.exc_info = plain.exc_text = plain.stack_info = None
            return super().format(plain)

    warnings.showwarning = show
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: not record.name.startswith("lightning"))  # has its own
    logging.getLogger().addHandler(handler)
