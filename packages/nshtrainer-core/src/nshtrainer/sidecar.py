"""What every family knows of the metadata beside a checkpoint: its name, and how to check a file by it.

Only the standard library is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any, cast

__all__ = ["CHECKSUM_KEY", "SIDECAR", "SIZE_KEY", "damage_of", "digest_of"]

SIDECAR = ".metadata.json"
"""What the name of a checkpoint is followed by."""

SIZE_KEY, CHECKSUM_KEY = "checkpoint_size_bytes", "checkpoint_checksum"
"""In the metadata: the file's size, and its SHA-256 as hexadecimal text."""

_CHUNK = 1 << 20


def digest_of(stream: IO[bytes]) -> tuple[int, str]:
    """Return size in bytes and SHA-256 of what is left in *stream*."""
    total, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        total.update(chunk)
        size += len(chunk)
    return size, total.hexdigest()


def damage_of(path: Path) -> str | None:
    """Why the checkpoint file *path* is not what was saved, as its metadata tell; reads all of it.

    Returns:
        What is wrong, or None if nothing is, or if there is no such file or no metadata.

    Raises:
        OSError: One of them cannot be read.
        ValueError: The metadata are no JSON.
    """
    sidecar = path.with_name(path.name + SIDECAR)
    if not (path.is_file() and sidecar.is_file()):
        return None
    content: Any = json.loads(sidecar.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return "its metadata hold no mapping"
    known = cast("dict[str, Any]", content)
    if path.stat().st_size != known.get(SIZE_KEY):
        return "its size is not that of what was saved"
    with path.open("rb") as file:
        if digest_of(file)[1] != known.get(CHECKSUM_KEY):
            return "its SHA-256 is not that of what was saved"
    return None
