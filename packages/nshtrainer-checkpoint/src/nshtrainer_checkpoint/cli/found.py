"""What lies below a folder: checkpoints, finished or not, and the links to them; opens none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from nshtrainer.errors import NshTrainerError
from nshtrainer.sidecar import SIDECAR
from nshtrainer_checkpoint.metadata import PENDING, Record, sidecar_of
from nshtrainer_checkpoint.names import EXTENSION

__all__ = ["Found", "NotFoundError", "State", "default_root", "find", "latest_first"]

State = Literal["ok", "unfinished", "no metadata", "bad metadata", "file missing", "size differs"]
LOGS = "nshtrainer_logs"
_POINTER = ".pointer.json"


class NotFoundError(NshTrainerError, FileNotFoundError):
    """There is nothing at the path that was given."""


@dataclass(frozen=True, eq=False)
class Found:
    """One checkpoint, or what is left of one."""

    path: Path
    state: State
    why: str = ""
    """More about a state that is not `ok`."""
    record: Record | None = None
    """What the sidecar tells, if it can be read."""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """All of the sidecar."""
    size: int = 0
    """Bytes, as the file system tells; of a directory as its sidecar tells."""
    modified: float | None = None
    """Seconds since the epoch."""
    links: tuple[str, ...] = ()
    """Names of the links that lead here."""

    @property
    def group(self) -> Path:
        """The folder that all checkpoints of one run share."""
        return self.path.parent.parent

    @property
    def run(self) -> str:
        """The run's id, or else the name of the folder that stands for it."""
        if self.record is not None and self.record.run_id:
            return self.record.run_id
        group = self.group
        return group.parent.name if group.name == "checkpoint" else group.name

    @property
    def order(self) -> tuple[int, int, int]:
        """By attempt, step and save number; without a record before all others."""
        return (-1, -1, -1) if self.record is None else self.record.order

    @property
    def value(self) -> float | None:
        """The monitored metric."""
        return None if self.record is None else self.record.value

    @property
    def metric(self) -> str | None:
        """Name of the monitored metric."""
        monitor: Any = self.metadata.get("monitor")
        return cast("dict[str, Any]", monitor).get("name") if isinstance(monitor, dict) else None


def default_root() -> Path:
    """The nearest `nshtrainer_logs`, here or in a folder above.

    Raises:
        NotFoundError: There is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.name == LOGS:
            return folder
        if (folder / LOGS).is_dir():
            return folder / LOGS
    raise NotFoundError(
        f"there is no {LOGS} in {here} or above it; say where the checkpoints are: a folder of "
        f"runs, a run, a folder of checkpoints or one file"
    )


def find(root: Path) -> list[Found]:
    """Return everything at or below *root*: a folder, a checkpoint or a link to one.

    Raises:
        NotFoundError: There is nothing at *root*.
    """
    if not os.path.lexists(root):
        raise NotFoundError(
            f"{root} does not exist; say where the checkpoints are: a folder of runs, a run, a "
            f"folder of checkpoints or one file"
        )
    real = Path(os.path.realpath(root))
    if real.is_dir() and real.suffix != EXTENSION:
        return list(_below(real))
    name = real.name
    for ending in (SIDECAR, PENDING):
        name = name.removesuffix(ending)
    wanted = real.with_name(name)
    if not os.path.lexists(wanted) and not os.path.lexists(sidecar_of(wanted)):
        raise NotFoundError(f"{root} leads to {real}, which does not exist; remove the link")
    mine = [found for found in _in_folder(wanted.parent) if found.path == wanted]
    if not mine:
        raise NotFoundError(f"{root} is no checkpoint; its name does not end with {EXTENSION}")
    return _with_links(mine, _links(wanted.parent.parent))


def latest_first(found: Iterable[Found]) -> list[Found]:
    """Sort runs by their latest file, and within a run by attempt, step and save number."""
    items = list(found)
    latest: dict[Path, float] = {}
    for item in items:
        latest[item.group] = max(latest.get(item.group, 0.0), item.modified or 0.0)
    return sorted(
        items,
        key=lambda f: (latest[f.group], str(f.group), f.order, str(f.path)),
        reverse=True,
    )


def _below(root: Path) -> Iterator[Found]:
    links: dict[Path, dict[str, Path]] = {}
    for folder, folders, _ in os.walk(root):
        folders[:] = sorted(n for n in folders if not n.endswith(EXTENSION) and n[0] != ".")
        here = Path(folder)
        items = list(_in_folder(here))
        if items:
            if here.parent not in links:
                links[here.parent] = _links(here.parent)
            yield from _with_links(items, links[here.parent])


def _in_folder(folder: Path) -> Iterator[Found]:
    try:
        with os.scandir(folder) as entries:
            names = {e.name: e.is_symlink() for e in entries}
    except OSError:
        return
    stems: set[str] = set()
    for name, is_link in names.items():
        for ending in (SIDECAR, PENDING, ""):
            stem = name.removesuffix(ending)
            if stem + ending == name and stem.endswith(EXTENSION):
                if not is_link and not (ending == "" and _is_link_by_place(folder, stem)):
                    stems.add(stem)
                break
    for stem in sorted(stems):
        yield _look(folder / stem, names.keys())


def _is_link_by_place(folder: Path, name: str) -> bool:
    """Whether a file without a sidecar lies beside the folder of its name: a hard link or copy."""
    stem = name.removesuffix(EXTENSION)
    return (folder / stem).is_dir() and not (folder / (name + SIDECAR)).exists()


def _look(path: Path, names: Iterable[str]) -> Found:
    try:
        status = path.stat()
    except OSError:
        status = None
    base = Found(
        path,
        "ok",
        size=0 if status is None else status.st_size,
        modified=None if status is None else status.st_mtime,
    )
    if path.name + SIDECAR not in names:
        if path.name + PENDING in names:
            return replace(base, state="unfinished", why="its writer was killed or is at work")
        return replace(base, state="no metadata", why="not of nshtrainer, or not finished")
    try:
        data: Any = json.loads(sidecar_of(path).read_bytes())
        record = Record.parse(path, data)
    except (OSError, ValueError, RecursionError) as error:
        return replace(base, state="bad metadata", why=f"{sidecar_of(path).name}: {error}")
    base = replace(base, record=record, metadata=cast("dict[str, Any]", data))
    if status is None:
        return replace(base, state="file missing", why=f"{record.size} bytes were written")
    if path.is_dir():
        return replace(base, size=record.size)
    if status.st_size != record.size:
        why = f"it has {status.st_size} bytes where {record.size} were written"
        return replace(base, state="size differs", why=why)
    return base


def _links(folder: Path) -> dict[str, Path]:
    """Link name -> what it leads to, of those in *folder*."""
    found: dict[str, Path] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return found
    for name in names:
        link = folder / name
        if name.endswith(EXTENSION):
            if link.is_symlink():
                found[name] = Path(os.path.realpath(link))
            elif link.is_file() and _is_link_by_place(folder, name):
                found[name] = link
        elif name.endswith(EXTENSION + _POINTER):
            try:
                target = json.loads(link.read_bytes())["checkpoint"]
                found[name] = Path(os.path.realpath(folder / str(target)))
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def _with_links(items: list[Found], links: dict[str, Path]) -> list[Found]:
    by_path: dict[Path, list[str]] = {}
    for name, target in links.items():
        by_path.setdefault(target, []).append(name)
    hard = {n: _inode(t) for n, t in links.items() if t.name == n}
    result: list[Found] = []
    for item in items:
        mine = list(by_path.get(Path(os.path.realpath(item.path)), ()))
        if hard and (inode := _inode(item.path)) is not None:
            mine += [n for n, i in hard.items() if i == inode and n[:-5] == item.path.parent.name]
        result.append(replace(item, links=tuple(sorted(mine))) if mine else item)
    return result


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
