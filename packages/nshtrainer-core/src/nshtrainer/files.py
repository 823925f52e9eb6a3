"""Files that are whole or absent: written beside their place, flushed to disk, put in place by rename.

A reader of a path written here finds the old content or the new, never a part, whenever the writer
is killed. What a killed writer leaves behind carries a name of our own form, with the host and
the process in it, so that `remove_leftovers` can tell it from a file that is being written.

Only the standard library is used: these functions serve config time as well as training.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, overload

__all__ = [
    "atomic_symlink",
    "atomic_write",
    "atomic_write_bytes",
    "atomic_write_text",
    "put_in_place",
    "remove_leftovers",
    "sync_directory",
    "temporary_path",
]

log = logging.getLogger(__name__)

_PREFIX = ".nshtrainer-"
_SUFFIX = ".tmp"
# The name never contains the target's: together they could exceed the 255 bytes of a file name.
_LEFTOVER = re.compile(
    re.escape(_PREFIX)
    + r"(?P<host>[\w.-]{1,80})@(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{16}"
    + re.escape(_SUFFIX)
)
# fsync on some network and FUSE file systems; nothing can be flushed there, which is no failure.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


class _Writer(NamedTuple):
    """A process as it can be recognised later, by another one."""

    host: str
    pid: int
    started: int
    """When it started, in kernel ticks since boot; 0 where that cannot be known."""


@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["wb"] = "wb", *, flush_directory: bool = True
) -> contextlib.AbstractContextManager[IO[bytes]]: ...
@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["w"], *, flush_directory: bool = True
) -> contextlib.AbstractContextManager[IO[str]]: ...
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb", *, flush_directory: bool = True
) -> contextlib.AbstractContextManager[IO[Any]]:
    """Open a temporary file that becomes *path* when the `with` block ends without an error.

    On any error, `KeyboardInterrupt` included, the temporary file is removed and *path* stays as
    it was. A new file gets the permissions that the process's umask leaves; a file that replaces
    one keeps the old permissions. A symlink at *path* is replaced, not followed.

    Args:
        path: The file to write; its directory must exist.
        mode: `"wb"` for bytes; `"w"` for text in UTF-8, newlines written as they are on every system.
        flush_directory: Wait until the new name, too, outlasts a power failure. False where the
            caller flushes the directory soon after; the content is flushed in any case.

    Raises:
        FileNotFoundError: The directory does not exist.
        IsADirectoryError: *path* is a directory.
        OSError: Writing, flushing or renaming failed (a full disk, say); *path* is untouched
            unless only the last step, flushing the directory, failed.
        ValueError: Another *mode*.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write got mode {mode!r}; it writes whole files: use 'wb' or 'w'.")
    return _atomic_write(Path(path), mode, flush_directory=flush_directory)


@contextlib.contextmanager
def _atomic_write(path: Path, mode: str, *, flush_directory: bool) -> Generator[IO[Any]]:
    old_permissions = _permissions(path)
    temporary = temporary_path(path)
    file = _create(temporary, mode, 0o666 if old_permissions is None else old_permissions)
    try:
        if old_permissions is not None and hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), old_permissions)  # the umask took some bits at creation
        yield file
        file.flush()
        _sync(file.fileno())
        file.close()  # before the rename: network file systems report a full disk here
        os.replace(temporary, path)
        if flush_directory:
            sync_directory(path.parent)
    except BaseException:
        # Closing flushes again and fails again on a full disk; the first error is the one to show.
        with contextlib.suppress(OSError, ValueError):
            file.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write *data* to *path* as `atomic_write` does."""
    with atomic_write(path, "wb") as file:
        file.write(data)


def atomic_write_text(
    path: str | os.PathLike[str], text: str, *, flush_directory: bool = True
) -> None:
    """Write *text* to *path* in UTF-8 as `atomic_write` does."""
    with atomic_write(path, "w", flush_directory=flush_directory) as file:
        file.write(text)


def atomic_symlink(target: str | os.PathLike[str], link: str | os.PathLike[str]) -> None:
    """Make *link* point to *target*; whatever file or link is there is replaced in one step.

    The link is relative to its own directory, so that the tree around both can be moved or
    mounted elsewhere. *target* need not exist.

    Args:
        target: A path as the process sees it (relative to its working directory).
        link: Where the link is made; its directory must exist.

    Raises:
        IsADirectoryError: *link* is a real directory, which is never replaced.
        ValueError: *link* and *target* are the same path.
        OSError: Links are not possible here (Windows without the privilege, some file systems).
    """
    target, link = Path(target), Path(link)
    # With links resolved in both directories: `..` in a link is walked physically.
    real_target = os.path.join(os.path.realpath(target.parent), target.name)
    directory = os.path.realpath(link.parent)
    if real_target == os.path.join(directory, link.name):
        raise ValueError(f"{str(link)!r} would point to itself; give another name for the link.")
    _permissions(link)  # refuses a directory
    temporary = temporary_path(link)
    _explain_missing_directory(
        link, lambda: os.symlink(os.path.relpath(real_target, directory), temporary)
    )
    try:
        os.replace(temporary, link)
        sync_directory(link.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """Return a fresh name in the directory of *path*, for a writer that must open the file itself.

    Nothing is created. `put_in_place` makes it *path*; `remove_leftovers` clears it if this
    process dies before.
    """
    writer = _this_process()
    token = secrets.token_hex(8)
    name = f"{_PREFIX}{writer.host}@{writer.pid}-{writer.started}-{token}{_SUFFIX}"
    return Path(path).parent / name


def put_in_place(
    temporary: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    flush: bool = True,
    flush_directory: bool = True,
) -> None:
    """Flush the finished file *temporary* to disk and rename it to *path*.

    Args:
        temporary: A file on the same file system, usually named by `temporary_path`.
        path: Its final name; a file or link there is replaced.
        flush: False where the caller has flushed the content.
        flush_directory: As for `atomic_write`.

    Raises:
        IsADirectoryError: *path* is a directory.
        OSError: Flushing or renaming failed; *path* is then untouched.
    """
    temporary, path = Path(temporary), Path(path)
    _permissions(path)  # refuses a directory
    if flush:
        descriptor = os.open(temporary, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)
    os.replace(temporary, path)
    if flush_directory:
        sync_directory(path.parent)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make renames in *directory* outlast a power failure; does nothing on Windows.

    Raises:
        OSError: The directory is not there, or its disk failed.
    """
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: str | os.PathLike[str], *, foreign: bool = False) -> list[Path]:
    """Remove what dead writers left in *directory* (not below it).

    Only names of our own form are touched, and of these only those whose process is gone: on this
    host the process is looked up; elsewhere it cannot be.

    Args:
        directory: Where to look; if it does not exist there is nothing to remove.
        foreign: Also remove what processes of other hosts and containers left. Only for a caller
            who knows that nobody else is writing here.

    Returns:
        What was removed, sorted. What could not be removed is logged.
    """
    removed: list[Path] = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return removed
    for name in names:
        match = _LEFTOVER.fullmatch(name)
        if match is None:
            continue
        writer = _Writer(match["host"], int(match["pid"]), int(match["started"]))
        if _may_be_alive(writer, foreign=foreign):
            continue
        path = Path(directory) / name
        try:
            _remove(path)
        except OSError as error:
            log.warning("could not remove %s, left by a dead process: %s", path, error)
        else:
            removed.append(path)
    return removed


def _permissions(path: Path) -> int | None:
    """Return the permission bits of the file at *path*, `None` without one; refuse a directory."""
    try:
        status = os.lstat(path)
    except OSError:  # absent, or not to be looked at: opening the file gives the fitting error
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(
            errno.EISDIR,
            "a directory is in the way and is never replaced; move it or choose another name",
            str(path),
        )
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


def _create(temporary: Path, mode: str, permissions: int) -> IO[Any]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # `os.open` applies the umask in the kernel: reading it in Python would change it for a moment,
    # for every thread.
    descriptor = _explain_missing_directory(
        temporary, lambda: os.open(temporary, flags | getattr(os, "O_CLOEXEC", 0), permissions)
    )
    if mode == "wb":
        return os.fdopen(descriptor, "wb")
    return os.fdopen(descriptor, "w", encoding="utf-8", newline="")


def _explain_missing_directory(path: Path, create: Callable[[], Any]) -> Any:
    """Call *create*; a missing directory is reported as such, not as a strange temporary name."""
    try:
        return create()
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, "the directory to write in does not exist; create it", str(path.parent)
        ) from None


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        log.debug("this file system cannot flush to disk: %s", error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # another rank may be cleaning too


def _this_process() -> _Writer:
    return _writer(os.getpid())  # a fork changes it


@functools.lru_cache(maxsize=2)
def _writer(pid: int) -> _Writer:
    """This process; kept, since reading its state takes milliseconds once it is large."""
    return _Writer(_host(), pid, (_state_and_start(pid) or ("?", 0))[1])


def _host() -> str:
    """Return the host's name, with the process-number space: containers may share the name."""
    try:
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        space = ""
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', socket.gethostname())[:60]}_{space}"


def _may_be_alive(writer: _Writer, *, foreign: bool) -> bool:
    if writer.host != _host():
        return not foreign
    if os.name == "nt":
        # Signal 0 would be Ctrl-C there. Windows refuses to remove an open file anyway.
        return writer.pid == os.getpid() or not foreign
    try:
        os.kill(writer.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # alive, another user's
    found = _state_and_start(writer.pid)
    if found is None:
        return True
    state, started = found
    # A zombie writes nothing any more; another start time means that the number was given again.
    return state not in "ZX" and (not writer.started or started == writer.started)


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """Return the state letter and start tick of a process, where Linux's /proc tells them."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
