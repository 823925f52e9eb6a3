"""The checkpoints of a run, as the metadata beside them tell; none is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from nshtrainer.sidecar import SIDECAR, SIZE_KEY

__all__ = ["Saved", "read_checkpoints"]

_EXTENSION: Final = ".ckpt"
_POINTER: Final = ".pointer.json"
_MAX_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    path: Path
    size: int
    state: str = ""
    """What is the matter with it; "" if nothing is known to be."""
    step: int | None = None
    epoch: int | None = None
    callback: str = ""
    """Who saved it."""
    metric: str = ""
    value: float | None = None
    mode: str = ""
    """Whether the lower (`min`) or higher (`max`) value is better."""
    seconds: float | None = None
    """Of training until it was saved."""
    order: tuple[int, int, int] = (-1, -1, -1)
    """The later one has the greater."""
    links: tuple[str, ...] = ()
    """Names of links that lead to it."""
    config: dict[str, Any] | None = None
    """The run's configuration, as it was recorded with it."""

    @property
    def is_best(self) -> bool:
        """Whether a link to the best one leads to it."""
        return any(name.startswith("best") for name in self.links)

    @property
    def is_last(self) -> bool:
        """Whether a link to the last one leads to it."""
        return any(name.startswith("last") for name in self.links)


def read_checkpoints(root: Path) -> list[Saved]:
    """Return the checkpoints in the run *root*, the newest first."""
    found: list[Saved] = []
    links: dict[str, list[str]] = {}
    for top in ("checkpoint", "checkpoints"):
        for folder, folders, files in os.walk(root / top):
            here = Path(folder)
            sharded = [n for n in folders if n.endswith(_EXTENSION)]
            folders[:] = sorted(n for n in folders if n not in sharded and not n.startswith("."))
            for name, target in _links(here, [*files, *sharded]):
                links.setdefault(target, []).append(name)
            found += _in_folder(here, {*files, *sharded})
    linked = [replace(s, links=tuple(sorted(links.get(_real(s.path), ())))) for s in found]
    return sorted(_marked(linked), key=lambda s: (s.order, str(s.path)), reverse=True)


def _links(folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """Name and target of what leads to a checkpoint; beside a hard link or a copy lies a pointer."""
    for name in names:
        path = folder / name
        if name.endswith(_EXTENSION) and path.is_symlink():
            yield name, _real(path)
        elif name.endswith(_EXTENSION + _POINTER):
            target = _json(path).get("checkpoint")
            if isinstance(target, str):
                yield name.removesuffix(_POINTER), _real(folder / target)


def _in_folder(folder: Path, names: set[str]) -> Iterator[Saved]:
    stems = {n.removesuffix(SIDECAR) for n in names}
    for name in sorted(n for n in stems if n.endswith(_EXTENSION)):
        path = folder / name
        if not path.is_symlink() and name + _POINTER not in names:
            yield _look(path, has_metadata=name + SIDECAR in names)


def _look(path: Path, *, has_metadata: bool) -> Saved:
    try:
        size = None if path.is_dir() else path.stat().st_size
        missing = False
    except OSError:
        size, missing = None, True
    if not has_metadata:
        return Saved(path, size or 0, state="no metadata")
    data = _json(path.with_name(path.name + SIDECAR))
    if not data:
        return Saved(path, size or 0, state="metadata unreadable")
    recorded = _whole(data.get(SIZE_KEY)) or 0
    monitor = data.get("monitor")
    monitored = cast("dict[str, Any]", monitor) if isinstance(monitor, dict) else {}
    config = data.get("trainer_config")
    state = "file missing" if missing else "size differs" if size not in (None, recorded) else ""
    return Saved(
        path,
        recorded if size is None else size,
        state=state,
        step=_whole(data.get("global_step")),
        epoch=_whole(data.get("epoch")),
        callback=str(data.get("callback") or ""),
        metric=str(monitored.get("name") or ""),
        value=_real_number(monitored.get("value")),
        mode=str(monitored.get("mode") or ""),
        seconds=_real_number(data.get("training_time_s")),
        order=_order(data),
        config=cast("dict[str, Any]", config) if isinstance(config, dict) else None,
    )


def _marked(found: list[Saved]) -> list[Saved]:
    """Mark the best and the last by what the metadata tell, where the run made no links."""
    whole = [s for s in found if not s.state and s.step is not None]
    if not any(s.is_best for s in found):
        ranked = [s for s in _of(whole, "best") if s.value is not None and s.value == s.value]
        best = [_best([s for s in ranked if s.metric == m]) for m in {s.metric for s in ranked}]
        found = [replace(s, links=(*s.links, "best")) if s in best else s for s in found]
    if not any(s.is_last for s in found):
        last = max(_of(whole, "last"), key=lambda s: s.order, default=None)
        is_last = [last is not None and s.path == last.path for s in found]
        found = [
            replace(s, links=(*s.links, "last")) if yes else s
            for s, yes in zip(found, is_last, strict=True)
        ]
    return found


def _of(found: list[Saved], kind: str) -> list[Saved]:
    """Those in folders of this kind, or all where there is no such folder."""
    return [s for s in found if s.path.parent.name.startswith(kind)] or found


def _best(found: list[Saved]) -> Saved:
    sign = -1 if found[0].mode == "max" else 1
    return min(found, key=lambda s: sign * (s.value or 0.0))


def _order(data: dict[str, Any]) -> tuple[int, int, int]:
    parts = [_whole(data.get(key)) for key in ("attempt", "global_step", "save_number")]
    first, second, third = (-1 if p is None else p for p in parts)
    return first, second, third


def _json(path: Path) -> dict[str, Any]:
    """The mapping in the file *path*; empty if it cannot be had."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        data: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _real_number(value: Any) -> float | None:
    """A number; NaN and infinity are text in JSON."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _real(path: Path) -> str:
    return os.path.realpath(path)
