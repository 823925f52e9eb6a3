"""Which run is meant: a run's folder, or one with several, of which the newest is taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from nshtrainer.errors import NshTrainerError
from nshtrainer.sidecar import SIDECAR

__all__ = ["LOGS", "NoRunError", "find_run", "nearest_logs", "newest_write"]

LOGS: Final = ("nshtrainer_logs", "lightning_logs")
"""Folders of runs, by which a project's folder is known."""

_SIGNS: Final = ("run.json", "metrics.csv", os.path.join("log", "csv"))
_HELP: Final = (
    "give the folder of a run (nshtrainer_logs/<run id>, or lightning_logs/version_<n>), or a folder "
    "that holds runs"
)


class NoRunError(NshTrainerError, FileNotFoundError):
    """There is no run where one was expected."""


def find_run(path: Path) -> tuple[Path, int]:
    """Return the run that *path* is or holds, the newest one, and how many it holds (0: it is one).

    Raises:
        NoRunError: There is none.
    """
    if not path.exists():
        raise NoRunError(f"{path} does not exist; {_HELP}")
    if not path.is_dir():
        raise NoRunError(f"{path} is a file; {_HELP}")
    if _is_run(path):
        return path, 0
    for folder in (path, *(path / name for name in LOGS)):
        if runs := _runs_in(folder):
            return max(runs, key=lambda r: (newest_write(r), r.name)), len(runs)
    raise NoRunError(f"{path} is no run and holds none; {_HELP}")


def nearest_logs() -> Path:
    """Return the nearest folder of runs, here or in a folder above.

    Raises:
        NoRunError: There is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        for name in LOGS:
            if folder.name == name:
                return folder
            if (folder / name).is_dir():
                return folder / name
    raise NoRunError(f"there is no {LOGS[0]} in {here} or above it; {_HELP}")


def newest_write(run: Path) -> float:
    """When a file of *run* was written last, in seconds since the epoch; 0 if that is not known.

    Looked at are its record, logs and checkpoint folders, not the folder itself: a report may be
    written there.
    """
    signs = [run / name for name in _SIGNS]
    paths = [
        *signs,
        run / "checkpoint",
        *run.glob("checkpoint/*"),
        *run.glob("log/csv/**/metrics.csv"),
    ]
    return max(map(_time, paths))


def _runs_in(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if p.is_dir() and _is_run(p)]
    except OSError:
        return []


def _is_run(folder: Path) -> bool:
    if any((folder / sign).exists() for sign in _SIGNS):
        return True
    return any(True for _ in folder.glob(f"checkpoint/*/*{SIDECAR}"))


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
