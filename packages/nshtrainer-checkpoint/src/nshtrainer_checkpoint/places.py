"""Where checkpoints lie: a folder of this machine, or a URL that fsspec understands.

Importing this brings neither fsspec nor universal-pathlib; `as_place` does, for a URL.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import unquote

from nshtrainer.errors import ConfigError

if TYPE_CHECKING:
    from upath import UPath

    Place: TypeAlias = Path | UPath
    """A path of this machine, or one in a store that fsspec reaches."""
else:
    Place = Any  # the real thing cannot be named without importing upath

__all__ = ["LinkPolicy", "Place", "as_place", "checked_place", "is_remote", "is_url"]

LinkPolicy: TypeAlias = Literal["symlink", "hardlink", "copy", "pointer", "none"]
"""How a documented name such as `last.ckpt` leads to a checkpoint."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_LOCAL = frozenset({"file", "local"})
# `Path("s3://bucket")` is `s3:/bucket`: the second slash cannot be had back.
_MANGLED = re.compile(
    r"(?:s3a?|gc?s|az|abfss?|adl|hf|hdfs|memory|file|local|https?|s?ftp|webdav):/(?!/)",
    re.IGNORECASE,
)
_INSTALL = 'pip install "nshtrainer-checkpoint[remote]"'


def is_url(value: object) -> bool:
    """Whether *value* is text such as `s3://bucket/run`, whatever its scheme."""
    return isinstance(value, str) and _URL.fullmatch(value) is not None


def is_remote(place: Place) -> bool:
    """Whether *place* lies in a store behind fsspec; False for a `pathlib.Path`."""
    return not isinstance(place, Path)


def checked_place(value: str | Path) -> str | Path:
    """Return *value* as a configuration holds it: the text of a URL, or a path; imports nothing.

    A `file://` URL becomes a path. A trailing slash of a URL is dropped.

    Raises:
        ConfigError: It is empty, a URL that went through `pathlib.Path`, a chain of file systems,
            a `file://` URL of another machine, or a URL without a place in it.
    """
    text = str(value)
    if not text:
        raise ConfigError("the folder is empty text; give a path or a URL, or leave it out")
    try:
        os.fsencode(text)
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} is no text ({error.reason}); give a path or a URL") from None
    if _MANGLED.match(text):
        raise ConfigError(
            f"{text!r} was a URL before it became a `pathlib.Path`, which drops a slash. "
            "Give the URL as text, such as 's3://bucket/folder'."
        )
    if isinstance(value, Path):
        return value
    if "::" in text and "://" in text:
        raise ConfigError(
            f"{text!r} chains file systems; a checkpoint in a cache or an archive is not where "
            "others look for it. Give the URL of the store itself."
        )
    match = _URL.fullmatch(text)
    if match is None:
        return Path(text)
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme in _LOCAL:
        return _local(text, rest)
    if not rest.strip("/"):
        raise ConfigError(f"{text!r} names no folder; give one, such as '{scheme}://bucket/folder'")
    return f"{scheme}://{rest.rstrip('/')}"


def as_place(value: str | Place) -> Place:
    """Return *value* as something to work with: a `UPath` for a URL, else a `pathlib.Path`.

    Credentials and addresses of a store come from its own environment variables and fsspec's
    (`FSSPEC_S3_ENDPOINT_URL` and the like), never from the URL.

    Raises:
        ConfigError: As `checked_place`; universal-pathlib or the library of the scheme is not
            installed; or fsspec does not know the scheme.
    """
    if not isinstance(value, (str, Path)):
        scheme = value.protocol
        return Path(value.path) if scheme in ("", *_LOCAL) else value
    checked = checked_place(value)
    if isinstance(checked, Path):
        return checked if type(checked) is type(Path()) else Path(str(checked))
    scheme = checked.partition("://")[0]
    try:
        from upath import UPath
    except ImportError as error:
        raise ConfigError(
            f"{checked!r} is a URL, which needs universal-pathlib ({error}); run `{_INSTALL}` and "
            f"install fsspec's library for {scheme!r}, or give a path of this machine"
        ) from None
    try:
        place = UPath(checked)
        _ = place.fs  # made now, so that what is missing is missing here and not at the first save
    except ImportError as error:
        raise ConfigError(
            f"{checked!r} needs a library that is not installed: {error}. Install it, or give a "
            "path of this machine."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{checked!r} cannot be used: {error}. Give a URL that fsspec knows, or a path of this "
            "machine."
        ) from None
    return place


def _local(text: str, rest: str) -> Path:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(
            f"{text!r} names the machine {host!r}; write three slashes for a path of this one, as "
            "in 'file:///data/run'"
        )
    path = unquote(path)
    is_drive = re.match(r"[A-Za-z]:(/|$)", path) is not None
    return Path(path if is_drive else f"/{path}")
