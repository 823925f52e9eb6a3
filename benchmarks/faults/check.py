"""What lies in a folder of checkpoints, found out without the code that wrote it.

Every checkpoint of `child` carries its step and a digest of its weights, so it proves itself; the
sidecars are parsed here by hand. Only the standard library and `torch.load` are used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

__all__ = ["Found", "Seen", "digest_of", "look", "survey", "tree_bytes"]

State = Literal["ok", "missing", "dangling", "torn", "mixed"]
SIDECAR, PENDING = ".metadata.json", ".pending.json"


class Seen(NamedTuple):
    """What a path leads to.

    Attributes:
        state: `torn` will not load; `mixed` loads, but is not what was saved.
        step: Optimizer steps made; -1 unless the state is `ok`.
    """

    state: State
    step: int = -1

    @property
    def is_ok(self) -> bool:
        """Whether it can be trained on from."""
        return self.state == "ok"


def digest_of(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors of *state_dict*, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(state_dict):
        total.update(name.encode())
        total.update(state_dict[name].detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def look(path: Path) -> Seen:
    """Load the checkpoint *path* (a file, or a link to one) and compare it with its own proof."""
    if not os.path.lexists(path):
        return Seen("missing")
    if not path.exists():
        return Seen("dangling")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        proof, weights = checkpoint["proof"], checkpoint["state_dict"]
    except Exception:  # noqa: BLE001 -- whatever torch says of a file that is not whole
        return Seen("torn")
    same = proof["sha256"] == digest_of(weights) and proof["step"] == checkpoint["global_step"]
    return Seen("ok", int(proof["step"])) if same else Seen("mixed")


@dataclass
class Found:
    """What `survey` finds; paths are relative to the folder.

    Attributes:
        last: Behind the documented name of the newest one.
        best: Behind that of the best one.
        files: Every checkpoint under a final name, committed or not.
        newest: Greatest step among those that exist for readers; -1 without any.
        torn: Final names with a file that does not load or is not what was saved.
        without_metadata: Final names that have neither a sidecar nor a pending one.
        in_flight: Final names that have only a pending sidecar: readers pass over them.
        without_file: Sidecars whose checkpoint is not there.
        unreadable: Sidecars that are no JSON mapping.
        lying: Sidecars with another size, SHA-256, name or step than the checkpoint.
        leftovers: Temporary files and pending sidecars.
        bytes_left: Size of the temporary files among them.
    """

    last: Seen
    best: Seen
    files: dict[str, Seen] = field(default_factory=dict[str, Seen])
    newest: int = -1
    torn: list[str] = field(default_factory=list[str])
    without_metadata: list[str] = field(default_factory=list[str])
    in_flight: list[str] = field(default_factory=list[str])
    without_file: list[str] = field(default_factory=list[str])
    unreadable: list[str] = field(default_factory=list[str])
    lying: list[str] = field(default_factory=list[str])
    leftovers: list[str] = field(default_factory=list[str])
    bytes_left: int = 0

    @property
    def faults(self) -> dict[str, Any]:
        """What must not be, by name; empty for a folder that a reader can rely on."""
        found: dict[str, Any] = {}
        if self.newest >= 0:
            found = {
                n: s.state for n, s in (("last", self.last), ("best", self.best)) if not s.is_ok
            }
        names = ("torn", "without_metadata", "without_file", "unreadable", "lying")
        return {**found, **{name: getattr(self, name) for name in names if getattr(self, name)}}


def survey(folder: Path, last: str, best: str, *, has_sidecars: bool = True) -> Found:
    """Look at everything below *folder*.

    Args:
        folder: Of the run's checkpoints.
        last: Documented name of the newest one.
        best: That of the best one, or a glob pattern: then the worst of the files it matches.
        has_sidecars: Whether a checkpoint exists for readers only with its metadata.
    """
    found = Found(look(folder / last), _worst(folder, best, last))
    present = sorted(p for p in folder.rglob("*") if p.is_symlink() or p.is_file())
    for path in present:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            continue
        if path.name.endswith(SIDECAR):
            _judge_sidecar(path, name, found)
        elif path.suffix == ".ckpt":
            _judge_file(path, name, found, has_sidecars=has_sidecars)
        else:
            found.leftovers.append(name)
            found.bytes_left += 0 if name.endswith(PENDING) else path.stat().st_size
    return found


def _worst(folder: Path, best: str, last: str) -> Seen:
    if "*" not in best:
        return look(folder / best)
    seen = [look(p) for p in sorted(folder.glob(best)) if p.name != last]
    return next((s for s in seen if not s.is_ok), seen[0] if seen else Seen("missing"))


def _judge_file(path: Path, name: str, found: Found, *, has_sidecars: bool) -> None:
    seen = found.files[name] = look(path)
    if not seen.is_ok:
        found.torn.append(name)
    if not has_sidecars or Path(f"{path}{SIDECAR}").exists():
        found.newest = max(found.newest, seen.step)
    elif Path(f"{path}{PENDING}").exists():
        found.in_flight.append(name)
    else:
        found.without_metadata.append(name)


def _judge_sidecar(sidecar: Path, name: str, found: Found) -> None:
    path = Path(str(sidecar).removesuffix(SIDECAR))
    if not path.exists():
        found.without_file.append(name)
        return
    try:
        told: Any = json.loads(sidecar.read_bytes())
        claims = (
            told["checkpoint_filename"],
            told["checkpoint_size_bytes"],
            told["checkpoint_checksum"],
            told["global_step"],
        )
    except (ValueError, KeyError, TypeError):
        found.unreadable.append(name)
        return
    content = path.read_bytes()
    facts = (path.name, len(content), hashlib.sha256(content).hexdigest(), look(path).step)
    if claims != facts:
        found.lying.append(name)


def tree_bytes(folder: Path) -> int:
    """Size of all files below *folder*."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
