"""The sidecar beside a checkpoint: its commit record, with size and SHA-256.

`NAME.ckpt.metadata.json` appears last and disappears first. A checkpoint without one is
unfinished: for readers it does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from nshtrainer.sidecar import CHECKSUM_KEY, SIDECAR, SIZE_KEY, digest_of

from . import objects
from .names import EXTENSION
from .places import Place

if TYPE_CHECKING:
    from upath import UPath

__all__ = [
    "Record",
    "SidecarReader",
    "digest",
    "is_intact",
    "json_number",
    "note_own_removal",
    "note_own_write",
    "pending_of",
    "plain_metrics",
    "read_record",
    "sidecar_of",
    "to_text",
]

log = logging.getLogger(__name__)

PENDING = ".pending.json"
_ENDING = EXTENSION + SIDECAR
_MAX_SIDECAR = 16 << 20

P = TypeVar("P", bound="Path | UPath")


def sidecar_of(path: P) -> P:
    """Return the path of the sidecar of the checkpoint *path*."""
    return path.with_name(path.name + SIDECAR)


def pending_of(path: P) -> P:
    """Return where a sidecar lies before its checkpoint is committed or while it is deleted."""
    return path.with_name(path.name + PENDING)


@dataclass(frozen=True)
class Record:
    """A committed checkpoint, as its sidecar tells."""

    path: Place
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
    weights_finite: bool = True
    """Whether no parameter was found to hold NaN or infinity when it was written."""
    size: int = 0
    sha256: str = ""

    @property
    def order(self) -> tuple[int, int, int]:
        """The later checkpoint has the greater one."""
        return self.attempt, self.step, self.save_number

    @classmethod
    def parse(cls, path: Place, data: Any) -> Record:
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
                attempt=_count(values["attempt"]),
                step=_count(values["global_step"]),
                save_number=_count(values["save_number"]),
                epoch=_count(values["epoch"]),
                value=None if monitor.get("value") is None else float(monitor["value"]),
                weights_only=bool(values["save_weights_only"]),
                weights_finite=values.get("weights_finite") is not False,
                size=_count(values[SIZE_KEY]),
                sha256=str(values[CHECKSUM_KEY]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _count(value: Any) -> int:
    """*value* as a whole number of things; `4.0` and `true` are other programs' ideas of one."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r} is no whole number from 0")
    return value


class _Read(NamedTuple):
    """A sidecar as it was read."""

    stamp: Any
    """What the file system tells of the content without reading it."""
    record: Record | None


@dataclass
class _Known:
    """What a reader knows of one folder."""

    sidecars: dict[str, _Read] = field(default_factory=dict[str, _Read])
    records: list[Record] = field(default_factory=list[Record])
    names: set[str] | None = None
    """All that was there."""
    seen: tuple[int, int] | None = None
    """The state of the folder then."""
    last_write: int = 0
    """The newest of this process's own writes then."""


@dataclass
class SidecarReader:
    """Reads the sidecars of folders; each is parsed once, and a bad one is warned of once.

    In a folder where this process commits, nobody else does (`recover` says so). There a sidecar
    that was read is read again only after this process has replaced it: asking the file system of
    each one would cost more than the save. Elsewhere size and time of change are compared.
    """

    _folders: dict[Place, _Known] = field(default_factory=dict[Place, _Known])
    _warned: set[str] = field(default_factory=set[str])

    def records(self, folder: Place) -> list[Record]:
        """Return the committed checkpoints in *folder*, in no particular order.

        What is damaged, foreign or has lost its checkpoint is left out.

        Raises:
            OSError: A store of objects cannot be reached.
        """
        known = self._folders.setdefault(folder, _Known())
        if not isinstance(folder, Path):
            found = objects.entries(folder)
            stamps = {n: (e.size, e.stamp) for n, e in found.items() if _checkpoint(n) in found}
            self._refresh(folder, known, stamps)
        elif (own := _own_writes.get(str(folder))) is None:
            names = _names_in(folder)
            self._refresh(folder, known, {n: None for n in names if _checkpoint(n) in names})
            known.names, known.seen, known.last_write = names, None, 0
        else:
            self._look_again(folder, known, own)
        return list(known.records)

    def _look_again(self, folder: Path, known: _Known, own: _OwnWrites) -> None:
        """Read what has come, or what this process has written, since the last time."""
        last_write = own.last
        try:
            status = os.stat(folder)
            seen = (status.st_mtime_ns, status.st_ino)
        except OSError:
            seen = None
        if seen is not None and seen == known.seen and last_write == known.last_write:
            return
        names = _names_in(folder)
        changed = names ^ (known.names or set())
        suspects = {n if n.endswith(_ENDING) else n + SIDECAR for n in changed}
        suspects.update(own.since(known.last_write))
        suspects.update(n for n, r in known.sidecars.items() if r.stamp is None)
        for name in suspects:
            known.sidecars.pop(name, None)
            if name in names and _checkpoint(name) in names:
                known.sidecars[name] = self._read(folder / name, None, None)
        if suspects:
            known.records = [r.record for r in known.sidecars.values() if r.record is not None]
        known.names, known.seen, known.last_write = names, seen, last_write

    def _refresh(self, folder: Place, known: _Known, stamps: dict[str, Any]) -> None:
        """Read those that are not known under their stamp, and forget those that are gone."""
        before = known.sidecars
        known.sidecars = {
            name: self._read(folder / name, stamp, before.get(name))
            for name, stamp in stamps.items()
        }
        known.records = [r.record for r in known.sidecars.values() if r.record is not None]

    def _read(self, sidecar: Place, stamp: Any, old: _Read | None) -> _Read:
        try:
            if isinstance(sidecar, Path):
                status = sidecar.stat()
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if old is not None and old.stamp == stamp:
                return old
            record = read_record(sidecar, sidecar.with_name(_checkpoint(sidecar.name)))
        except OSError as error:
            reason = error.strerror or str(error)
            self._warn(sidecar, f"cannot be read ({reason}); its checkpoint is left alone")
            return _Read(None, None)  # may pass; looked at again the next time
        except ValueError as error:
            self._warn(
                sidecar,
                f"is no usable metadata ({error}); its checkpoint is neither used nor deleted. "
                "Remove both if nothing else needs them.",
            )
        else:
            return _Read(stamp, record)
        return _Read(stamp, None)

    def _warn(self, sidecar: Place, message: str) -> None:
        if f"{sidecar} {message}" not in self._warned:
            self._warned.add(f"{sidecar} {message}")
            log.warning("%s %s", sidecar, message)


class _OwnWrites:
    """The sidecars of one folder that this process has put there, the newest last."""

    def __init__(self) -> None:
        self.last = 0
        self._numbers: dict[str, int] = {}

    def note(self, name: str, *, is_there: bool) -> None:
        """Take note of a write or a removal, after it."""
        self._numbers.pop(name, None)
        number = next(_numbers)
        if is_there:
            self._numbers[name] = number
        self.last = number

    def since(self, number: int) -> list[str]:
        """What was written after the write *number*."""
        newest_first = reversed(list(self._numbers.items()))  # a copy: another thread may commit
        return [
            name for name, _ in itertools.takewhile(lambda item: item[1] > number, newest_first)
        ]


_own_writes: dict[str, _OwnWrites] = {}
_numbers = itertools.count(1)


def note_own_write(sidecar: Place) -> None:
    """Remember that this process has just written *sidecar*; readers look at it again."""
    _own_writes.setdefault(str(sidecar.parent), _OwnWrites()).note(sidecar.name, is_there=True)


def note_own_removal(sidecar: Place) -> None:
    """Remember that this process has just removed *sidecar*."""
    _own_writes.setdefault(str(sidecar.parent), _OwnWrites()).note(sidecar.name, is_there=False)


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def read_record(sidecar: Place, path: Place) -> Record:
    """Read *sidecar*, which may have a pending name, as that of the checkpoint *path*.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, larger than any sidecar, no JSON, or not what `Record.parse`
            expects.
    """
    if isinstance(sidecar, Path):
        status = sidecar.stat()  # opening a pipe would wait for a writer
        is_file, size = stat.S_ISREG(status.st_mode), status.st_size
    else:
        entry = objects.look(sidecar)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(sidecar))
        is_file, size = not entry.is_folder, entry.size
    if not is_file:
        raise ValueError("it is no file")
    if size > _MAX_SIDECAR:
        raise ValueError(f"it has {size} bytes")
    data = sidecar.read_bytes() if isinstance(sidecar, Path) else objects.read(sidecar)
    try:
        return Record.parse(path, json.loads(data))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _checkpoint(sidecar: str) -> str:
    """Name of the checkpoint of a sidecar; of another name, one that no folder holds."""
    return sidecar[: -len(SIDECAR)] if sidecar.endswith(_ENDING) else ""


def digest(path: Place) -> tuple[int, str]:
    """Return size in bytes and SHA-256 of a file, or of a directory with everything in it.

    What lies in a store is streamed, and kept neither in memory nor on disk.
    """
    if isinstance(path, Path):
        if not path.is_dir():
            return _digest_file(path)
        files = [(f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.is_file()]
    else:
        entry = objects.look(path)
        if entry is None or not entry.is_folder:
            return _digest_file(path)
        files = list(objects.tree(path))
    total, size = hashlib.sha256(), 0
    for name, file in sorted(files):
        bytes_, sha256 = _digest_file(file)
        total.update(f"{name}\0{bytes_}\0{sha256}\n".encode())
        size += bytes_
    return size, total.hexdigest()


def _digest_file(file: Place) -> tuple[int, str]:
    with file.open("rb") if isinstance(file, Path) else objects.open_file(file) as stream:
        return digest_of(stream)


def is_intact(record: Record) -> bool:
    """Whether the checkpoint is what was committed: size, then SHA-256; reads all of it."""
    path = record.path
    try:
        if isinstance(path, Path):
            if not path.is_dir() and path.stat().st_size != record.size:
                return False
        else:
            entry = objects.look(path)
            if entry is None or (not entry.is_folder and entry.size != record.size):
                return False
        return digest(path) == (record.size, record.sha256)
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


def to_text(metadata: Mapping[str, Any]) -> str:
    """Return the content of a sidecar, a line for each key: as fast as `json` is without indents."""
    try:
        lines = [_line(key, value) for key, value in metadata.items()]
    except ValueError:  # it looks for them faster than we do
        lines = [_line(key, _json_value(value)) for key, value in metadata.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(key: str, value: Any) -> str:
    return f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}"


def _json_value(value: Any) -> Any:
    """Return plain data as JSON can hold it: NaN and infinity in it become text."""
    if isinstance(value, dict):
        return {key: _json_value(v) for key, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in cast("list[Any]", value)]
    return json_number(value) if isinstance(value, float) else value


def json_number(value: float | None) -> float | str | None:
    """Return *value* as JSON can hold it: NaN and infinity become text."""
    return value if value is None or math.isfinite(value) else str(value)
