"""Files in a store behind fsspec: what is committed there is whole, or absent, once it is listed.

Object stores have no rename and no links; a file appears when it has been written. Every error is
an `OSError`, so that callers treat a store like a disk.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from upath import UPath

__all__ = [
    "Entry",
    "entries",
    "look",
    "make_folder",
    "open_file",
    "read",
    "tree",
    "unlink",
    "upload",
    "write",
]

# Keys there are just names: asking for a folder could only make a bucket, by mistake.
_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"})
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "updated", "last_modified",
           "mtime", "modified", "created")  # fmt: skip
_BLOCK = 8 << 20


class Entry(NamedTuple):
    """What a listing says of a name."""

    size: int
    is_folder: bool
    stamp: str
    """Changes with the content, as far as the store tells."""


def entries(folder: UPath) -> dict[str, Entry]:
    """Return what lies in *folder* by name, as the store says now; nothing if there is no such folder."""
    with _as_os_errors(folder):
        _fs(folder).invalidate_cache(folder.path)
        try:
            found = cast("list[dict[str, Any]]", _fs(folder).ls(folder.path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
    named = {str(info["name"]).rstrip("/").rpartition("/")[2]: _entry(info) for info in found}
    named.pop("", None)
    return named


def look(place: UPath) -> Entry | None:
    """Return what the store says of *place* now, None if it is not there."""
    with _as_os_errors(place):
        _fs(place).invalidate_cache(place.parent.path)
        try:
            return _entry(cast("dict[str, Any]", _fs(place).info(place.path)))
        except FileNotFoundError:
            return None


def read(place: UPath) -> bytes:
    """Return the content of *place*."""
    with _as_os_errors(place):
        return cast("bytes", _fs(place).cat_file(place.path))


def write(place: UPath, data: bytes) -> None:
    """Make *data* the content of *place*, in one request."""
    with _as_os_errors(place):
        _fs(place).pipe_file(place.path, data)


@contextlib.contextmanager
def open_file(place: UPath) -> Generator[IO[bytes]]:
    """Read *place* from first to last byte without holding it."""
    with _as_os_errors(place), _fs(place).open(place.path, "rb", block_size=_BLOCK) as stream:
        yield stream


def upload(source: Path, target: UPath) -> None:
    """Copy the local file or directory *source* to *target*.

    Raises:
        OSError: It could not be copied, or the store has another size of it.
    """
    files = sorted(f for f in source.rglob("*") if f.is_file()) if source.is_dir() else [source]
    for file in files:
        place = target.joinpath(*file.relative_to(source).parts) if file != source else target
        with _as_os_errors(place):
            _fs(place).put_file(str(file), place.path)
        entry, size = look(place), file.stat().st_size
        if entry is None or entry.size != size:
            raise OSError(
                errno.EIO,
                f"the store has {entry and entry.size} bytes of the {size} that were sent",
                str(place),
            )


def unlink(place: UPath) -> None:
    """Delete a file or everything below a folder, if it is there."""
    entry = look(place)
    if entry is None:
        return
    with _as_os_errors(place), contextlib.suppress(FileNotFoundError):
        if entry.is_folder:
            _fs(place).rm(place.path, recursive=True)
        else:
            _fs(place).rm_file(place.path)


def tree(folder: UPath) -> Iterator[tuple[str, UPath]]:
    """Yield every file below *folder* with its relative name, sorted."""
    with _as_os_errors(folder):
        _fs(folder).invalidate_cache(folder.path)
        found = cast("list[str]", _fs(folder).find(folder.path))
    root = folder.path.strip("/") + "/"
    for name in sorted(f.strip("/").removeprefix(root) for f in found):
        yield name, folder.joinpath(*PurePosixPath(name).parts)


def make_folder(folder: UPath) -> None:
    """Make *folder* where the store knows folders; a bucket is never made."""
    if folder.protocol not in _WITHOUT_FOLDERS:
        with _as_os_errors(folder):
            _fs(folder).makedirs(folder.path, exist_ok=True)


def _fs(place: UPath) -> Any:
    return cast("Any", place.fs)  # fsspec is not typed


def _entry(info: dict[str, Any]) -> Entry:
    stamp = "|".join(str(info[key]) for key in _STAMPS if info.get(key) is not None)
    return Entry(int(info.get("size") or 0), info.get("type") == "directory", stamp)


@contextlib.contextmanager
def _as_os_errors(place: UPath) -> Generator[None]:
    """Whatever a store's library raises becomes an `OSError` that names *place*.

    Without an errno of its own it is `EIO`, which is tried again.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None or type(error) not in (OSError, TimeoutError, ConnectionError):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(place)) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(place)) from error
