"""Committing, removing and linking checkpoints, so that a kill at any moment leaves a whole one.

A commit: the finished temporary file gets its digest, the future sidecar is written under a
pending name, the file is renamed to its own name, and the pending name to the sidecar's: only now
the checkpoint exists for readers. A removal goes the same way back. Whatever a killed process left
is therefore known by a temporary or a pending name, and `recover` clears it.

In a store of objects (`objects`) nothing can be renamed: the file is uploaded under its own name
after its pending record and before its sidecar, and so exists for readers by the sidecar alone.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nshtrainer.files import (
    atomic_write_text,
    put_in_place,
    remove_leftovers,
    sync_directory,
    temporary_path,
)
from nshtrainer.sidecar import CHECKSUM_KEY, SIDECAR, SIZE_KEY

from . import objects
from .metadata import (
    PENDING,
    Record,
    digest,
    is_intact,
    note_own_removal,
    note_own_write,
    pending_of,
    read_record,
    sidecar_of,
    to_text,
)
from .names import EXTENSION
from .places import Place

if TYPE_CHECKING:
    from upath import UPath

__all__ = [
    "commit",
    "discard",
    "explaining",
    "free_name",
    "make_folder",
    "recover",
    "remove",
    "share",
    "temporary_for",
    "whole_but_pending",
]

log = logging.getLogger(__name__)

P = TypeVar("P", bound="Path | UPath")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def temporary_for(path: Place, staging: Path | None = None) -> Path:
    """Return a fresh local name under which the checkpoint *path* is written before its commit.

    Args:
        path: Where it will be.
        staging: A local folder for what goes to a remote store; None is one of this user's in the
            system's folder for temporary files (`TMPDIR`).

    Raises:
        OSError: That folder cannot be made, or belongs to somebody else.
    """
    if isinstance(path, Path):
        return temporary_path(path)
    staging = _staging() if staging is None else staging
    staging.mkdir(parents=True, exist_ok=True)
    return temporary_path(staging / path.name)


def make_folder(folder: Place) -> None:
    """Make *folder* with those above it; in a store without folders there is nothing to do."""
    if not isinstance(folder, Path):
        objects.make_folder(folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise type(error)(
            error.errno,
            "there is a file where the folder for checkpoints belongs; move it away, or give another "
            "`dirpath`",
            str(folder),
        ) from error


def commit(
    temporary: Path,
    path: Place,
    metadata: dict[str, Any],
    known: tuple[int, str] | None = None,
    *,
    then: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make the finished file or directory *temporary* the checkpoint *path*.

    Called again after an error, it goes on where it was.

    Args:
        temporary: In the folder of *path*, or for a remote *path* anywhere; gone afterwards.
        path: Its name; a checkpoint file that is there is replaced.
        metadata: Content of the sidecar; size and checksum are added.
        known: Size and SHA-256, if whoever wrote the file took them, and flushed it; else it is read
            again.
        then: Called as soon as *path* exists for readers, before that outlasts a power failure:
            a process that is killed has hardly time to leave a link behind. Must not raise.

    Returns:
        The content of the sidecar.

    Raises:
        OSError: Something could not be written. *path* is as it was, or whole and new. A full disk
            is told with the bytes that are needed and free.
    """
    is_moved = known is not None and not os.path.lexists(temporary) and _is_moved(path, known)
    size, sha256 = known or digest(temporary)
    metadata = {
        "format_version": 1,
        "checkpoint_filename": path.name,
        SIZE_KEY: size,
        CHECKSUM_KEY: sha256,
        **metadata,
    }
    text = to_text(metadata)
    with explaining(path, size):
        if isinstance(path, Path):
            _commit_here(temporary, path, text, is_moved=is_moved, is_flushed=known is not None)
            then()
            # One flush for both names: should only the sidecar's outlast a power failure, `recover`
            # clears it, and what came before is deleted later.
            sync_directory(path.parent)
        else:
            _commit_there(temporary, path, text, is_moved=is_moved)
            then()
    note_own_write(sidecar_of(path))
    return metadata


def _commit_here(
    temporary: Path, path: Path, text: str, *, is_moved: bool, is_flushed: bool
) -> None:
    pending = pending_of(path)
    try:
        atomic_write_text(pending, text, flush_directory=False)  # done with the checkpoint's name
        if is_moved:
            pass
        elif temporary.is_dir():
            _sync_tree(temporary)
            os.replace(temporary, path)
        else:
            put_in_place(temporary, path, flush=not is_flushed, flush_directory=False)
    except BaseException:
        # Once the file has its name, only the pending record tells whose it is.
        if os.path.lexists(temporary):
            with contextlib.suppress(OSError):
                pending.unlink(missing_ok=True)
        raise
    put_in_place(pending, sidecar_of(path), flush=False, flush_directory=False)


def _commit_there(temporary: Path, path: UPath, text: str, *, is_moved: bool) -> None:
    """As `_commit_here`, with an upload in the place of the rename: readers see the sidecar last."""
    pending = pending_of(path)
    try:
        objects.write(pending, text.encode())
        if not is_moved:
            objects.upload(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if objects.look(sidecar_of(path)) is None:
                objects.unlink(path)  # a part of it, in a store that shows parts
            objects.unlink(pending)
        raise
    discard(temporary)
    objects.write(sidecar_of(path), text.encode())
    with contextlib.suppress(OSError):  # `recover` knows it for what it is
        objects.unlink(pending)


def _is_moved(path: Place, known: tuple[int, str]) -> bool:
    """Whether an earlier try has put the file at *path* and failed at the sidecar, or just after."""
    record = _read(pending_of(path), path) or _read(sidecar_of(path), path)
    return record is not None and (record.size, record.sha256) == known and is_intact(record)


@contextlib.contextmanager
def explaining(path: Place, needed: int | None = None) -> Generator[None]:
    """Have an `OSError` of the block name *path*; a full disk also says what is needed and free.

    Args:
        path: What is being written.
        needed: Its size in bytes, where it is known.

    Raises:
        OSError: Of the same kind and errno.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            wanted = "more" if needed is None else f"{needed} bytes"
            raise OSError(
                error.errno,
                f"{error.strerror}: {wanted} must be written and {_free(path)}. Free some space, "
                "keep fewer checkpoints (`topk`), or give another `dirpath`",
                str(path),
            ) from error
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _free(path: Place) -> str:
    folder = path if isinstance(path, Path) else Path(tempfile.gettempdir())
    folder = folder if folder.is_dir() else folder.parent
    try:
        return f"{shutil.disk_usage(folder).free} are free in {folder}"
    except OSError:
        return f"how many are free in {folder} is not known"


def share(source: Path, target: Path) -> None:
    """Give the finished file or directory *source* a second name, by hard link where possible.

    Raises:
        OSError: It could be neither linked nor copied; nothing of *target* is left.
    """
    try:
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)
    except OSError:
        discard(target)
        try:
            with explaining(target, None if source.is_dir() else source.stat().st_size):
                if source.is_dir():
                    shutil.copytree(source, target)
                else:
                    shutil.copyfile(source, target)
                    _flush(target)
        except BaseException:
            with contextlib.suppress(OSError):
                discard(target)
            raise


def remove(record: Record) -> bool:
    """Delete a committed checkpoint; False, with a warning, if that is not possible."""
    path, sidecar, pending = record.path, sidecar_of(record.path), pending_of(record.path)
    try:
        _rename(sidecar, pending)
        note_own_removal(sidecar)
        discard(path)
        discard(pending)
    except OSError as error:
        log.warning("the old checkpoint %s could not be deleted: %s", path, error)
        return False
    return True


def discard(path: Place) -> None:
    """Delete a file or a whole directory, if it is there."""
    if not isinstance(path, Path):
        objects.unlink(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Place, is_ours: Callable[[Record], bool]) -> None:
    """Clear what a killed process left in *folder*; only for the one process that writes there.

    A checkpoint that was about to be committed is committed if it is whole. What has neither a
    sidecar nor a pending name of ours is left alone.

    Raises:
        OSError: Something could not be read or deleted.
    """
    if isinstance(folder, Path):
        remove_leftovers(folder)
        present = set(os.listdir(folder))
    else:
        remove_leftovers(_staging())
        present = set(objects.entries(folder))
    for name in sorted(n for n in present if n.endswith(EXTENSION + PENDING)):
        path = folder / name.removesuffix(PENDING)
        record = _read(folder / name, path)
        if record is not None and is_ours(record):
            log.info("clearing up after a process that was killed while it wrote %s", path)
            _resolve(record, has_sidecar=sidecar_of(path).name in present)
    for name in sorted(n for n in present if n.endswith(EXTENSION + SIDECAR)):
        path = folder / name.removesuffix(SIDECAR)
        if path.name in present:
            continue
        record = _read(folder / name, path)
        if record is not None and is_ours(record):
            discard(folder / name)
            note_own_removal(folder / name)


def whole_but_pending(folder: Place) -> list[Record]:
    """Return what `recover` would commit in *folder*: whole files that have only a pending name."""
    if isinstance(folder, Path):
        names = set(os.listdir(folder)) if folder.is_dir() else set[str]()
    else:
        names = set(objects.entries(folder))
    found: list[Record] = []
    for name in sorted(n.removesuffix(PENDING) for n in names if n.endswith(EXTENSION + PENDING)):
        record = _read(folder / (name + PENDING), folder / name)
        if record is not None and name + SIDECAR not in names and is_intact(record):
            found.append(record)
    return found


def _resolve(record: Record, *, has_sidecar: bool) -> None:
    """Finish or undo what the pending name of *record* stands for."""
    path, pending, sidecar = record.path, pending_of(record.path), sidecar_of(record.path)
    if not is_intact(record):
        if not has_sidecar:
            discard(path)
        discard(pending)
        return
    _rename(pending, sidecar)
    note_own_write(sidecar)


def _rename(source: Place, target: Place) -> None:
    """Give a sidecar its other name; in a store it has both for a moment."""
    if isinstance(source, Path):
        os.replace(source, str(target))
    elif not isinstance(target, Path):
        objects.write(target, objects.read(source))
        objects.unlink(source)


def _read(sidecar: Place, path: Place) -> Record | None:
    try:
        return read_record(sidecar, path)
    except (OSError, ValueError):
        return None


def free_name(folder: P, stem: str, taken: Collection[Place] = ()) -> P:
    """Return a path for *stem* that nothing has, by adding `-v1`, `-v2` and so on if need be.

    Raises:
        OSError: A store of objects cannot be reached.
    """
    first = folder / (stem + EXTENSION)
    names = {p.name for p in taken if p.parent == folder}
    if isinstance(folder, Path):
        mine = (first, sidecar_of(first), pending_of(first))
        if first.name not in names and not any(os.path.lexists(str(p)) for p in mine):
            return first
        with contextlib.suppress(FileNotFoundError):
            names.update(os.listdir(folder))
    else:
        names.update(objects.entries(folder))
    for version in itertools.count():
        name = stem + (f"-v{version}" if version else "") + EXTENSION
        if names.isdisjoint((name, name + SIDECAR, name + PENDING)):
            return folder / name
    raise AssertionError  # pragma: no cover -- counting does not end


def _staging() -> Path:
    """A local folder of this user's for what is on its way to a store."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir()) / f"nshtrainer-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()):
        raise PermissionError(
            errno.EACCES,
            "it belongs to somebody else; set TMPDIR to a folder of yours",
            str(folder),
        )
    return folder


def _sync_tree(directory: Path) -> None:
    """Flush every file below *directory*, then the directories."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in (*names, "."):
            _flush(Path(folder) / name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
