"""Documented names such as `last.ckpt`, which lead to a checkpoint wherever links are possible or not.

A symbolic link where the file system has them; else a hard link, a copy, or `NAME.pointer.json`,
a small file that names the checkpoint, which is what stores of objects get.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from nshtrainer.errors import ConfigError
from nshtrainer.files import atomic_symlink, atomic_write_text, put_in_place, temporary_path

from . import objects
from .places import LinkPolicy, as_place

if TYPE_CHECKING:
    from upath import UPath

    from .places import Place

__all__ = ["LinkPolicy", "follow", "point", "pointer_of", "real_name"]

log = logging.getLogger(__name__)

_ORDER: tuple[LinkPolicy, ...] = ("symlink", "hardlink", "copy", "pointer")
_POINTER = ".pointer.json"
_said: set[str] = set()

P = TypeVar("P", bound="Path | UPath")


def pointer_of(link: P) -> P:
    """Return the path of the pointer file of *link*."""
    return link.with_name(link.name + _POINTER)


def point(link: Place, target: Place | None, policy: LinkPolicy = "symlink") -> LinkPolicy:
    """Make *link* lead to *target*, in one step; what we did not make is left alone.

    What is not possible falls back: `symlink` to `hardlink` to `copy` to `pointer`. A directory is
    neither hard-linked nor copied, and a store has pointers only.

    Args:
        link: The documented name; its folder exists.
        target: A checkpoint that is there. None removes a link that leads nowhere.
        policy: What to try first; `none` does nothing.

    Returns:
        What was made, `none` for nothing. What was not asked for is warned of once for a link.
    """
    if policy == "none":
        return "none"
    if target is None:
        _remove_dangling(link)
        return "none"
    if not isinstance(link, Path):
        return _try(link, target, "pointer", policy)
    if not _may_replace(link):
        _say(link, f"{link} is no link, so it is left alone; the checkpoint is {target}")
        return "none"
    start = _ORDER.index(policy if isinstance(target, Path) else "pointer")
    for kind in _ORDER[start:]:
        made = _try(link, target, kind, policy)
        if made != "none":
            return made
    return "none"


def follow(link: Place) -> Place | None:
    """Return the checkpoint that *link* leads to, whatever kind it is; None if there is none.

    A name out of a pointer is only followed downwards, from the folder of the link.
    """
    if isinstance(link, Path) and link.is_symlink():
        target = link.parent / os.readlink(link)
        return Path(os.path.normpath(target)) if target.exists() else None
    target = _pointed(link)
    if target is not None and _exists(target):
        return target
    return link if _exists(link) else None


def real_name(source: object) -> str:
    """Return what names the checkpoint *source*, a path, a URL or a link to one, once and for all."""
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "protocol"):
        return repr(source)  # an open file
    try:
        place = as_place(str(cast("Any", source)))
        place = follow(place) or place
    except (ConfigError, OSError):
        return str(cast("Any", source))  # a store that we do not reach
    return os.path.realpath(place) if isinstance(place, Path) else str(place)


def _try(link: Place, target: Place, kind: LinkPolicy, asked: LinkPolicy) -> LinkPolicy:
    """Make a link of one *kind*; returns `none` where that is not possible."""
    try:
        if kind == "pointer" or not isinstance(link, Path) or not isinstance(target, Path):
            _make_pointer(link, target)
        elif kind == "symlink":
            _make_symlink(link, target)
        elif target.is_dir():
            return "none"
        elif kind != "none":
            _make_file(link, target, kind)
    except OSError as error:
        if kind == "pointer":
            _say(link, f"the link {link} could not be made ({error}); the checkpoint is {target}")
        else:
            log.debug("%s cannot be a %s: %s", link, kind, error)
        return "none"
    if kind != asked:
        _say(link, f"{link} is made as a {kind}, since a {asked} is not possible there")
    return kind


def _make_symlink(link: Path, target: Path) -> None:
    relative = os.path.relpath(target, link.parent)
    if not (link.is_symlink() and os.readlink(link) == relative):
        atomic_symlink(target, link)
    _drop_pointer(link)


def _make_file(link: Path, target: Path, kind: Literal["hardlink", "copy"]) -> None:
    """A second name or a copy; the pointer beside it tells whose it is."""
    known = _load(link)
    content = {"checkpoint": _relative(link, target), "kind": kind, "source": _identity(target)}
    if (
        known is not None
        and {k: known.get(k) for k in content} == content
        and _is_ours(link, known)
    ):
        return
    temporary = temporary_path(link)
    try:
        if kind == "hardlink":
            os.link(target, temporary)
        else:
            shutil.copyfile(target, temporary)
        # Before the file: if this process is killed between the two, either one is known as ours.
        files = [_identity(temporary)] + ([_identity(link)] if _is_file(link) else [])
        atomic_write_text(pointer_of(link), json.dumps({**content, "files": files}) + "\n")
        put_in_place(temporary, link)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _make_pointer(link: Place, target: Place) -> None:
    content: dict[str, Any] = {"checkpoint": _relative(link, target)}
    if content["checkpoint"].startswith("../"):
        raise OSError(f"{target} is not below {link.parent}")
    pointer, is_in_the_way = pointer_of(link), isinstance(link, Path) and os.path.lexists(link)
    if isinstance(link, Path) and _is_file(link):
        content["files"] = [_identity(link)]  # if this process is killed now, it is still known
    if _load(link) != content:
        text = json.dumps(content) + "\n"
        if isinstance(pointer, Path):
            atomic_write_text(pointer, text)
        else:
            objects.write(pointer, text.encode())
    if is_in_the_way:
        link.unlink()


def _remove_dangling(link: Place) -> None:
    try:
        if isinstance(link, Path) and link.is_symlink() and not link.exists():
            link.unlink()
        target = _pointed(link)
        is_file = isinstance(link, Path) and link.exists()
        if target is not None and not is_file and not _exists(target):
            _drop_pointer(link)
    except OSError as error:
        log.warning("the link %s leads nowhere and could not be removed: %s", link, error)


def _may_replace(link: Path) -> bool:
    """Whether nothing is at *link*, or what we have put there."""
    if link.is_symlink() or not os.path.lexists(link):
        return True
    known = _load(link)
    return known is not None and _is_ours(link, known)


def _is_ours(link: Path, known: dict[str, Any]) -> bool:
    files = known.get("files")
    return _is_file(link) and isinstance(files, list) and _identity(link) in files


def _is_file(link: Path) -> bool:
    return link.is_file() and not link.is_symlink()


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _load(link: Place) -> dict[str, Any] | None:
    """The content of the pointer of *link*, if it is one of ours."""
    pointer = pointer_of(link)
    try:
        data = pointer.read_bytes() if isinstance(pointer, Path) else objects.read(pointer)
        content = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    found = cast("dict[str, Any]", content)
    return found if isinstance(found.get("checkpoint"), str) else None


def _pointed(link: Place) -> Place | None:
    """What the pointer of *link* names: something below its folder, or a URL of its own store."""
    known = _load(link)
    if known is None:
        return None
    name = posixpath.normpath(str(known["checkpoint"]))
    if name in (".", "..") or name.startswith(("../", "/")) or "\\" in name or ":" in name:
        log.warning(
            "%s names %r, which is not below it; it is not followed", pointer_of(link), name
        )
        return None
    return link.parent.joinpath(*name.split("/"))


def _relative(link: Place, target: Place) -> str:
    if isinstance(link, Path) and isinstance(target, Path):
        return Path(os.path.relpath(target, link.parent)).as_posix()
    folder, path = str(link.parent).rstrip("/") + "/", str(target)
    if not path.startswith(folder):
        raise OSError(f"{target} is not below {folder}")
    return path.removeprefix(folder)


def _drop_pointer(link: Place) -> None:
    if _load(link) is None:
        return
    pointer = pointer_of(link)
    if isinstance(pointer, Path):
        pointer.unlink(missing_ok=True)
    else:
        objects.unlink(pointer)


def _exists(place: Place) -> bool:
    return place.exists() if isinstance(place, Path) else objects.look(place) is not None


def _say(link: Place, message: str) -> None:
    """Warn once in a process for a link and a message."""
    if f"{link}{message}" not in _said:
        _said.add(f"{link}{message}")
        log.warning("%s", message)
