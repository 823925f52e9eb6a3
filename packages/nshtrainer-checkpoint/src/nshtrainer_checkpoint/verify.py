"""Whether checkpoints are what was committed: size and SHA-256. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

from . import objects
from .metadata import Record, digest

__all__ = ["damage"]


def damage(record: Record, *, fast: bool = False) -> str | None:
    """Say what is wrong with the checkpoint of *record*; None if it is whole.

    Args:
        record: What its sidecar tells.
        fast: Compare sizes only; a directory is then only looked for.
    """
    path = record.path
    try:
        if isinstance(path, Path):
            is_folder, size = path.is_dir(), path.stat().st_size
        elif (entry := objects.look(path)) is not None:
            is_folder, size = entry.is_folder, entry.size
        else:
            return "the file is missing"
        if not is_folder and size != record.size:
            return f"it has {size} bytes where {record.size} were written"
        if fast:
            return None
        size, sha256 = digest(path)
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    if size != record.size:
        return f"it has {size} bytes where {record.size} were written"
    if sha256 != record.sha256:
        return f"its content differs: SHA-256 {sha256[:12]}, and {record.sha256[:12]} was written"
    return None
