"""The sidecar beside a checkpoint: its commit record, with size and SHA-256.

`NAME.ckpt.metadata.json` appears last and disappears first. A checkpoint without one is
unfinished: for readers it does not exist.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from .names import EXTENSION

__all__ = [
    "Record",
    "SidecarReader",
    "digest",
    "is_intact",
    "pending_of",
    "plain_metrics",
    "sidecar_of",
]

log = logging.getLogger(__name__)

SIDECAR = ".metadata.json"
PENDING = ".pending.json"
_CHUNK = 1 << 20


def sidecar_of(path: Path) -> Path:
    """Return the path of the sidecar of the checkpoint *path*."""
    return path.with_name(path.name + SIDECAR)


def pending_of(path: Path) -> Path:
    """Return where a sidecar lies before its checkpoint is committed or while it is deleted."""
    return path.with_name(path.name + PENDING)


@dataclass(frozen=True)
class Record:
    """A committed checkpoint, as its sidecar tells."""

    path: Path
    run_id: str | None
    callback: str
    """Identity of the callback that wrote it."""
    attempt: int
    step: int
    save_number: int
    """Counts the saves of a run over all its callbacks."""
    epoch: int = 0
    value: float | None = None
    """The monitored metric."""
    weights_only: bool = False
    size: int = 0
    sha256: str = ""

    @property
    def order(self) -> tuple[int, int, int]:
        """The later checkpoint has the greater one."""
        return self.attempt, self.step, self.save_number

    @classmethod
    def parse(cls, path: Path, data: Any) -> Record:
        """Read the content of the sidecar of *path*; unknown keys are left alone.

        Raises:
            ValueError: A key is missing or of a wrong kind, or it is another file's sidecar.
        """
        if not isinstance(data, dict):
            raise ValueError("it holds no mapping")  # noqa: TRY004 -- one kind of error for content
        values = cast("dict[str, Any]", data)
        if values.get("checkpoint_filename") != path.name:
            raise ValueError(f"it belongs to {values.get('checkpoint_filename')!r}")
        run_id = values.get("run_id")
        try:
            monitor = cast("dict[str, Any]", values.get("monitor") or {})
            return cls(
                path=path,
                run_id=None if run_id is None else str(run_id),
                callback=str(values["callback"]),
                attempt=int(values["attempt"]),
                step=int(values["global_step"]),
                save_number=int(values["save_number"]),
                epoch=int(values["epoch"]),
                value=None if monitor.get("value") is None else float(monitor["value"]),
                weights_only=bool(values["save_weights_only"]),
                size=int(values["checkpoint_size_bytes"]),
                sha256=str(values["checkpoint_checksum"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass
class SidecarReader:
    """Reads the sidecars of folders; each is parsed once, and a bad one is warned of once."""

    _known: dict[Path, tuple[tuple[int, int, int], Record | None]] = field(
        default_factory=dict[Path, "tuple[tuple[int, int, int], Record | None]"]
    )

    def records(self, folder: Path) -> list[Record]:
        """Return the committed checkpoints in *folder*, in no particular order.

        What is damaged, foreign or has lost its checkpoint is left out.
        """
        return list(self._records(folder))

    def _records(self, folder: Path) -> Iterator[Record]:
        try:
            names = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        present = set(names)
        for name in names:
            checkpoint = name.removesuffix(SIDECAR)
            if checkpoint != name and checkpoint.endswith(EXTENSION) and checkpoint in present:
                record = self._read(folder / name, folder / checkpoint)
                if record is not None:
                    yield record

    def _read(self, sidecar: Path, path: Path) -> Record | None:
        try:
            status = sidecar.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = self._known.get(sidecar)
            if known is not None and known[0] == stamp:
                return known[1]
            text = sidecar.read_bytes()
        except OSError as error:
            log.warning("%s cannot be read (%s); its checkpoint is left alone", sidecar, error)
            return None
        record = None
        try:
            record = Record.parse(path, json.loads(text))
        except ValueError as error:  # JSON and Unicode errors are ones too
            log.warning(
                "%s is no usable metadata (%s); its checkpoint is neither used nor deleted. "
                "Remove both if nothing else needs them.",
                sidecar,
                error,
            )
        self._known[sidecar] = (stamp, record)
        return record


def digest(path: Path) -> tuple[int, str]:
    """Return size in bytes and SHA-256 of a file, or of a directory with everything in it."""
    if not path.is_dir():
        total = hashlib.sha256()
        size = _add(path, total)
        return size, total.hexdigest()
    total, size = hashlib.sha256(), 0
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
        one = hashlib.sha256()
        bytes_ = _add(file, one)
        total.update(f"{file.relative_to(path).as_posix()}\0{bytes_}\0{one.hexdigest()}\n".encode())
        size += bytes_
    return size, total.hexdigest()


def _add(file: Path, total: Any) -> int:
    size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total.update(chunk)
            size += len(chunk)
    return size


def is_intact(record: Record) -> bool:
    """Whether the checkpoint is what was committed: size, then SHA-256; reads all of it."""
    try:
        if not record.path.is_dir() and record.path.stat().st_size != record.size:
            return False
        return digest(record.path) == (record.size, record.sha256)
    except OSError:
        return False


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those *metrics* that are single numbers, as floats; fetches them from their device."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            log.debug("metric %r is no single number; left out of the metadata", name)
    return values


def json_number(value: float | None) -> float | str | None:
    """Return *value* as JSON can hold it: NaN and infinity become text."""
    return value if value is None or math.isfinite(value) else str(value)
