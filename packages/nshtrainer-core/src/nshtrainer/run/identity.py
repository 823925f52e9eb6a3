"""A run's id: how one is made, which ones are allowed, how a launch hands it to its processes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Generator
from typing import Final

from nshtrainer.errors import ConfigError

__all__ = [
    "RUN_ID_VARIABLE",
    "folder_name",
    "known_run_id",
    "new_run_id",
    "run_id_in_environment",
    "validate_run_id",
]

RUN_ID_VARIABLE: Final = "NSHTRAINER_RUN_ID"
"""The environment variable in which a launch tells its processes the run's id."""

_LETTERS = "abcdefghjkmnpqrstuvwxyz"  # without i, l, o: people read ids to each other
_CHARACTERS = _LETTERS + "23456789"
_ALLOWED = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_MAX_BYTES = 120
# Windows opens a device for these, whatever follows the first dot.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def new_run_id() -> str:
    """Return a fresh id: 8 lower-case letters and digits, none of them easily confused.

    The first is a letter, so that no file format takes an id for a number. The system's randomness
    is used: seeding Python, numpy or torch neither fixes the id nor is disturbed by it.
    """
    return secrets.choice(_LETTERS) + "".join(secrets.choice(_CHARACTERS) for _ in range(7))


def validate_run_id(run_id: str) -> str:
    """Return *run_id* if it can safely name one directory on every system.

    Raises:
        ConfigError: It is empty, longer than 128 characters, holds anything but letters, digits,
            `.`, `_` and `-`, starts with `.` or `-`, ends with `.`, or names a Windows device.
    """
    if _ALLOWED.fullmatch(run_id) is None or _DEVICES.fullmatch(run_id) is not None:
        raise ConfigError(
            f"the run id {_shortened(run_id)} cannot name a directory; an id has 1 to 128 letters, "
            "digits, '.', '_' and '-', does not start with '.' or '-' or end with '.', and is no "
            "device name such as 'con'. Change it, or leave it out and one is made."
        )
    return run_id


def folder_name(text: str) -> str:
    """*text*, which a person wrote, as the name of one folder on every system; "" stays "".

    What separates folders or has a meaning somewhere becomes `_`; at most 120 bytes are kept.
    """
    if not text:
        return ""
    safe = re.sub(r'[/\\<>:"|?*\x00-\x1f\x7f]', "_", text)
    short = safe.encode(errors="replace")[:_MAX_BYTES].decode(errors="ignore").strip().rstrip(". ")
    return f"_{short}" if not short or _DEVICES.fullmatch(short) else short


def known_run_id(configured: str | None = None) -> str | None:
    """Return the id that is settled already: the configured one, else the launch's, else `None`.

    Args:
        configured: What the config says; it wins over `NSHTRAINER_RUN_ID`.

    Raises:
        ConfigError: The id found is not a valid one; the message says where it came from.
    """
    if configured is not None:
        return validate_run_id(configured)
    launched = os.environ.get(RUN_ID_VARIABLE)
    if not launched:
        return None
    try:
        return validate_run_id(launched)
    except ConfigError as error:
        raise ConfigError(f"in the environment variable {RUN_ID_VARIABLE}, {error}") from None


@contextlib.contextmanager
def run_id_in_environment(run_id: str) -> Generator[None]:
    """Set `NSHTRAINER_RUN_ID` for the processes that are started inside the `with` block.

    The earlier value comes back at the end, so that a second run in this process, or another
    program it starts later, does not inherit the id.
    """
    before = os.environ.get(RUN_ID_VARIABLE)
    os.environ[RUN_ID_VARIABLE] = validate_run_id(run_id)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(RUN_ID_VARIABLE, None)
        else:
            os.environ[RUN_ID_VARIABLE] = before


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 140 else f"{text[:60]!r}... ({len(text)} characters)"
