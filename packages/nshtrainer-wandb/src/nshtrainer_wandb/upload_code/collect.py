"""Which files are the source code of a run: decided here, uploaded elsewhere."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from nshtrainer.errors import NshTrainerError

from .secret_files import holds_secret, is_secret_file

__all__ = ["Selection", "SourceUnknownError", "collect", "find_root", "matches"]

log = logging.getLogger(__name__)

_GIT_TIMEOUT_S: Final = 30
_MAX_WALKED: Final = 100_000
"""Directory entries after which a folder without git is too large to be source code."""

# fmt: off
_SUFFIXES: Final = frozenset(
    {
        ".py", ".pyi", ".pyx", ".pxd", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs",
        ".jl", ".sh", ".bash", ".zsh", ".slurm", ".sbatch", ".lsf", ".yaml", ".yml", ".toml",
        ".cfg", ".ini", ".md", ".rst", ".sql", ".jinja", ".j2",
    }
)
# fmt: on
_NAMES: Final = frozenset(
    {"dockerfile", "makefile", "justfile", "license", "snakefile", "conda-lock"}
)
# fmt: off
_SKIPPED: Final = frozenset(
    {
        "__pycache__", "node_modules", "site-packages", "venv", "env", "build", "dist", "wandb",
        "nshtrainer_logs", "lightning_logs", "mlruns", "outputs",
    }
)
# fmt: on
"""Folders that a walk without git does not enter; nor those whose name starts with a dot."""


class SourceUnknownError(NshTrainerError, RuntimeError):
    """It cannot be told which files are source code; nothing should be uploaded then."""


@dataclass
class Selection:
    """What is uploaded, and what is not and why."""

    files: dict[str, int] = field(default_factory=dict[str, int])
    """Path relative to the root, with `/` -> bytes."""

    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Path -> reason."""


def collect(
    root: Path,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    max_file_bytes: int = 1_000_000,
    max_total_bytes: int = 50_000_000,
    known_secrets: Sequence[str] = (),
) -> Selection:
    """Choose the files below *root* to upload.

    In a git repository: what is tracked, and source files that are neither tracked nor ignored.
    Elsewhere, and where git ignores *root* itself: source files, without hidden folders,
    environments and caches.

    Args:
        root: A directory.
        include: Globs; a file that matches one is taken whatever its kind, and others are not.
        exclude: Globs; a file that matches one is not taken.
        max_file_bytes: Larger files are left out.
        max_total_bytes: The largest files are left out until the rest is no larger.
        known_secrets: A file that holds one of these texts is left out.

    Raises:
        SourceUnknownError: *root* is in a git repository and git cannot be asked what it ignores, or
            there is no repository and the folder has over 100,000 entries.
    """
    selection = Selection()
    for path in sorted(set(_candidates(root, takes_any_kind=include is not None))):
        if include is not None and not matches(path, include):
            continue
        if matches(path, exclude):
            selection.left_out[path] = "excluded"
            continue
        reason = _objection(root / path, path, max_file_bytes, known_secrets)
        if reason is None:
            selection.files[path] = (root / path).stat().st_size
        else:
            selection.left_out[path] = reason
    _shrink(selection, max_total_bytes)
    return selection


def find_root(directory: Path) -> Path:
    """Return the root of the git repository around *directory*, or *directory* if there is none."""
    directory = directory.absolute()
    for folder in (directory, *directory.parents):
        if (folder / ".git").exists():
            return folder
    return directory


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether *path* (relative, with `/`) fits one of the glob *patterns*.

    `*` matches `/` too. A pattern without `/` is compared with each part of the path; one that
    fits a folder fits what is in it.
    """
    parts = path.split("/")
    for pattern in patterns:
        wanted = pattern.removeprefix("./").rstrip("/")
        if "/" not in wanted:
            if any(fnmatchcase(part, wanted) for part in parts):
                return True
        elif fnmatchcase(path, wanted) or fnmatchcase(path, f"{wanted}/*"):
            return True
    return False


def _candidates(root: Path, *, takes_any_kind: bool) -> Iterator[str]:
    is_in_git = (find_root(root) / ".git").exists()
    if is_in_git and not _is_ignored(root):
        yield from _git_files(root, "--cached")
        untracked = _git_files(root, "--others", "--exclude-standard")
        yield from (p for p in untracked if takes_any_kind or _is_source(p))
        return
    yield from (p for p in _walk(root) if takes_any_kind or _is_source(p))


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git, which must not wait for a lock or a password.

    Raises:
        SourceUnknownError: It is missing or does not answer.
    """
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-C", os.fspath(root), *arguments]
    try:
        return subprocess.run(  # noqa: S603 -- arguments are ours
            command,
            env=environment,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceUnknownError(f"git cannot be asked about {root}: {error}") from error


def _is_ignored(root: Path) -> bool:
    done = _git(root, "check-ignore", "--quiet", ".")
    if done.returncode not in (0, 1):
        raise SourceUnknownError(_complaint(root, done))
    return done.returncode == 0


def _git_files(root: Path, *which: str) -> list[str]:
    done = _git(root, "ls-files", "-z", *which)
    if done.returncode != 0:
        raise SourceUnknownError(_complaint(root, done))
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _complaint(root: Path, done: subprocess.CompletedProcess[bytes]) -> str:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"git cannot list the files of {root}: {said[0] if said else done.returncode}"


def _walk(root: Path) -> Iterator[str]:
    seen = 0
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name.lower() not in _SKIPPED
            and not (here / name / "pyvenv.cfg").exists()
        )
        seen += len(folders) + len(files)
        if seen > _MAX_WALKED:
            raise SourceUnknownError(
                f"{root} is no git repository and has over {_MAX_WALKED} entries; set `directory` "
                "to the folder of the source code"
            )
        yield from ((here / name).relative_to(root).as_posix() for name in files)


def _is_source(path: str) -> bool:
    name = path.rsplit("/", 1)[-1].lower()
    is_requirements = name.startswith("requirements") and name.endswith(".txt")
    return os.path.splitext(name)[1] in _SUFFIXES or name in _NAMES or is_requirements


def _objection(file: Path, path: str, max_bytes: int, known_secrets: Sequence[str]) -> str | None:
    """Why *file* is not uploaded, if it is not."""
    if is_secret_file(path):
        return "its name is that of a secret"
    if file.is_symlink() or not file.is_file():  # a link may lead anywhere; a submodule is a folder
        return "it is not a plain file"
    try:
        if (size := file.stat().st_size) > max_bytes:
            return f"it has {size} bytes, more than {max_bytes}"
        if holds_secret(file.read_bytes(), known_secrets):
            return "it holds a private key, or a secret of the environment"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def _shrink(selection: Selection, max_total_bytes: int) -> None:
    total = sum(selection.files.values())
    for path, size in sorted(selection.files.items(), key=lambda item: (-item[1], item[0])):
        if total <= max_total_bytes:
            return
        total -= size
        del selection.files[path]
        selection.left_out[path] = f"all files together are larger than {max_total_bytes} bytes"
