"""Which files are the source code of a run: decided here, uploaded elsewhere."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nshtrainer.errors import NshTrainerError
from nshtrainer.run.redaction import secrets_in_environment

from .secret_contents import find_secret
from .secret_files import is_archive, is_secret_file

if TYPE_CHECKING:
    from .config import WandbUploadCodeCallbackConfig

__all__ = [
    "FileRefusedError",
    "Selection",
    "SourceUnknownError",
    "collect",
    "find_root",
    "matches",
    "read_plain_file",
    "select",
]

log = logging.getLogger(__name__)

_GIT_TIMEOUT_S: Final = 30
_GIT_POINTERS: Final = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
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


class FileRefusedError(NshTrainerError, ValueError):
    """A file is not uploaded; the message is the reason, without the file's name."""


@dataclass
class Selection:
    """What is uploaded, and what is not and why."""

    files: dict[str, int] = field(default_factory=dict[str, int])
    """Path relative to the root, with `/` -> bytes."""

    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Path -> reason."""

    secrets: list[str] = field(default_factory=list[str])
    """Those of `left_out` that look like secrets."""

    def leave_out_secret(self, path: str, reason: str) -> None:
        """Note that *path* is not uploaded because it is, or holds, a secret."""
        self.left_out[path] = reason
        self.secrets.append(path)


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

    In a git repository: what is tracked, in submodules too, and source files that are neither tracked
    nor ignored. Elsewhere, and where git ignores *root* itself: source files, without hidden folders,
    environments and caches. Never: links, what lies behind links, archives, and what looks like a
    secret by its name or by what is in it.

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
        if is_secret_file(path):
            selection.leave_out_secret(path, "its name is that of a secret")
            continue
        try:
            content = read_plain_file(root, path, max_file_bytes)
        except FileRefusedError as error:
            selection.left_out[path] = str(error)
            continue
        if (secret := find_secret(content, known_secrets, path=path)) is not None:
            selection.leave_out_secret(path, f"it holds {secret}")
        else:
            selection.files[path] = len(content)
    _shrink(selection, max_total_bytes)
    return selection


def select(
    config: WandbUploadCodeCallbackConfig, directory: Path | None = None
) -> tuple[Path, Selection]:
    """Return from where, and what, a run with *config* would upload; nothing is sent.

    Args:
        config: Its patterns and sizes.
        directory: Comes before the configuration's; both None is the root of the git repository around
            the current directory, or that directory if there is none.

    Raises:
        SourceUnknownError: See `collect`; or the directory is none.
    """
    chosen = directory or config.directory
    root = find_root(Path.cwd()) if chosen is None else chosen.expanduser().absolute()
    if not root.is_dir():
        raise SourceUnknownError(f"{root} is no folder; give the one of the source code")
    return root, collect(
        root,
        include=config.include,
        exclude=config.exclude,
        max_file_bytes=config.max_file_bytes,
        max_total_bytes=config.max_total_bytes,
        known_secrets=secrets_in_environment(),
    )


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
        yield from _git_files(root, "--cached", "--recurse-submodules")
        untracked = _git_files(root, "--others", "--exclude-standard")
        yield from (p for p in untracked if takes_any_kind or _is_source(p))
        return
    yield from (p for p in _walk(root) if takes_any_kind or _is_source(p))


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git, which must not wait for a lock or a password.

    Raises:
        SourceUnknownError: It is missing or does not answer.
    """
    # A program that git itself has started, a hook say, is pointed to git's own repository.
    environment = {k: v for k, v in os.environ.items() if k not in _GIT_POINTERS}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
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
    except FileNotFoundError as error:
        raise SourceUnknownError(
            f"{root} is in a git repository, and git, which knows what it ignores, is not installed; "
            "install it, or set `directory` to a copy of the source code outside of the repository"
        ) from error
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


def read_plain_file(root: Path, path: str, max_bytes: int) -> bytes:
    """Return what is in *path* below *root*, if no link leads to it.

    Raises:
        FileRefusedError: It is a link or lies behind one, is no plain file, is larger than *max_bytes*, or
            cannot be read; the message says which.
    """
    file = root / path
    # A folder of a tracked file may have become a link, which leads anywhere.
    if os.path.realpath(file) != os.path.join(os.path.realpath(root), *path.split("/")):
        raise FileRefusedError("it is a link, or lies behind one")
    try:
        if not file.is_file():  # a submodule is a folder; what git tracks may be gone
            raise FileRefusedError("it is no plain file" if file.exists() else "it is not there")
        if (size := file.stat().st_size) > max_bytes:
            raise FileRefusedError(f"it has {size} bytes, more than {max_bytes}")
        if is_archive(path):
            raise FileRefusedError("it is an archive, which cannot be searched for secrets")
        return file.read_bytes()
    except OSError as error:
        raise FileRefusedError(f"it cannot be read ({error.strerror})") from error


def _shrink(selection: Selection, max_total_bytes: int) -> None:
    total = sum(selection.files.values())
    for path, size in sorted(selection.files.items(), key=lambda item: (-item[1], item[0])):
        if total <= max_total_bytes:
            return
        total -= size
        del selection.files[path]
        selection.left_out[path] = f"all files together are larger than {max_total_bytes} bytes"
