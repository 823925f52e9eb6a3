"""Committing, removing and linking checkpoints, so that a kill at any moment leaves a whole one.

A commit: the finished temporary file gets its digest, the future sidecar is written under a
pending name, the file is renamed to its own name, and the pending name to the sidecar's: only now
the checkpoint exists for readers. A removal goes the same way back. Whatever a killed process left
is therefore known by a temporary or a pending name, and `recover` clears it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nshtrainer.files import (
    atomic_symlink,
    atomic_write_text,
    put_in_place,
    remove_leftovers,
)

from .metadata import PENDING, SIDECAR, Record, digest, is_intact, pending_of, sidecar_of
from .names import EXTENSION

__all__ = ["commit", "discard", "free_name", "point_link", "recover", "remove", "share"]

log = logging.getLogger(__name__)


def commit(
    temporary: Path,
    path: Path,
    metadata: dict[str, Any],
    known: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """Make the finished file or directory *temporary* the checkpoint *path*.

    Args:
        temporary: In the folder of *path*.
        path: Its name; a checkpoint file that is there is replaced.
        metadata: Content of the sidecar; size and checksum are added.
        known: Size and SHA-256, if whoever wrote the file took them; else it is read again.

    Returns:
        The content of the sidecar.

    Raises:
        OSError: Something could not be written. *path* is as it was, or whole and new.
    """
    size, sha256 = known or digest(temporary)
    metadata = {
        "format_version": 1,
        "checkpoint_filename": path.name,
        "checkpoint_size_bytes": size,
        "checkpoint_checksum": sha256,
        **metadata,
    }
    pending = pending_of(path)
    try:
        atomic_write_text(pending, json.dumps(metadata, indent=2, allow_nan=False) + "\n")
        if temporary.is_dir():
            _sync_tree(temporary)
            os.replace(temporary, path)
        else:
            put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            pending.unlink(missing_ok=True)
        raise
    put_in_place(pending, sidecar_of(path))
    return metadata


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
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copyfile(source, target)
        except BaseException:
            with contextlib.suppress(OSError):
                discard(target)
            raise


def remove(record: Record) -> bool:
    """Delete a committed checkpoint; False, with a warning, if that is not possible."""
    pending = pending_of(record.path)
    try:
        os.replace(sidecar_of(record.path), pending)
        discard(record.path)
        pending.unlink()
    except OSError as error:
        log.warning("the old checkpoint %s could not be deleted: %s", record.path, error)
        return False
    return True


def discard(path: Path) -> None:
    """Delete a file or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path, is_ours: Callable[[Record], bool]) -> None:
    """Clear what a killed process left in *folder*; only for the one process that writes there.

    A checkpoint that was about to be committed is committed if it is whole.
    """
    remove_leftovers(folder)
    for pending in sorted(folder.glob(f"*{EXTENSION}{PENDING}")):
        path = pending.with_name(pending.name.removesuffix(PENDING))
        record = _read(pending, path)
        if record is None or not is_ours(record):
            continue
        log.info("clearing up after a process that was killed while it wrote %s", path)
        if is_intact(record):
            os.replace(pending, sidecar_of(path))
            continue
        if not sidecar_of(path).exists():
            discard(path)
        pending.unlink()
    for sidecar in sorted(folder.glob(f"*{EXTENSION}{SIDECAR}")):
        path = sidecar.with_name(sidecar.name.removesuffix(SIDECAR))
        record = None if os.path.lexists(path) else _read(sidecar, path)
        if record is not None and is_ours(record):
            sidecar.unlink()


def _read(sidecar: Path, path: Path) -> Record | None:
    try:
        return Record.parse(path, json.loads(sidecar.read_bytes()))
    except (OSError, ValueError):
        return None


def free_name(folder: Path, stem: str, taken: Collection[Path] = ()) -> Path:
    """Return a path for *stem* that nothing has, by adding `-v1`, `-v2` and so on if need be."""
    version = 0
    while True:
        path = folder / (stem + (f"-v{version}" if version else "") + EXTENSION)
        if path not in taken and not any(
            os.path.lexists(p) for p in (path, sidecar_of(path), pending_of(path))
        ):
            return path
        version += 1


def point_link(link: Path, target: Path | None) -> None:
    """Make *link* point to *target*, in one step; what is not a link is left alone.

    None removes a link that leads nowhere. Where links are not possible there is a warning.
    """
    try:
        if target is None:
            if link.is_symlink() and not link.exists():
                link.unlink()
        elif os.path.lexists(link) and not link.is_symlink():
            log.warning("%s is no link, so it is left alone; the checkpoint is %s", link, target)
        elif not link.is_symlink() or os.readlink(link) != os.path.relpath(target, link.parent):
            atomic_symlink(target, link)
    except OSError as error:
        log.warning(
            "the link %s could not be made (%s); the checkpoint itself is %s. "
            "Set `save_symlink=False` where links are not possible.",
            link,
            error,
            target,
        )


def _sync_tree(directory: Path) -> None:
    """Flush every file below *directory*, then the directories."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in (*names, "."):
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # some file systems cannot
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
