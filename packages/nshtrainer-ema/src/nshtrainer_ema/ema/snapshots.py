"""Averages with power-function profiles as files, one for each step and width, and sums of them.

A snapshot `ema-step0000012000-sigma0.1.pt` is read by `torch.load(weights_only=True)`:

    {
        "version": 1,
        "step": 12000,          # updates are counted in these steps, from 1
        "sigma_rel": 0.1,       # relative width of the profile
        "tensors": {name: tensor},
        "metadata": {...},      # plain data of the writer's
    }

Step and width are in the name too, so that finding snapshots opens none and needs no torch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import TypeAdapter, ValidationError

from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.files import atomic_write, remove_leftovers, sync_directory
from nshtrainer.types import PlainData

from .power_function import MAX_ERROR, fit_profile, gamma_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "SNAPSHOT_FOLDER",
    "Reconstruction",
    "Snapshot",
    "SnapshotError",
    "SnapshotNotFoundError",
    "discard_after",
    "list_snapshots",
    "plan_reconstruction",
    "reconstruct",
    "write_snapshot",
]

log = logging.getLogger(__name__)

SNAPSHOT_FOLDER: Final = "ema"
"""Name of the folder of snapshots in a run's directory."""

_VERSION: Final = 1
_NAME = re.compile(r"ema-step(\d+)-sigma(\d+(?:\.\d+)?(?:e-?\d+)?)\.pt")

Progress = Callable[[int, int], None]
"""Called with the number of snapshots that have been read, and of all."""


class SnapshotError(NshTrainerError, ValueError):
    """A snapshot is damaged, or does not belong to the others."""


class SnapshotNotFoundError(NshTrainerError, FileNotFoundError):
    """There is no snapshot to read."""


@dataclass(frozen=True, order=True)
class Snapshot:
    """One file; sorted by step, then width."""

    step: int
    sigma_rel: float
    path: Path


def write_snapshot(
    folder: Path,
    *,
    step: int,
    sigma_rel: float,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write one average to *folder*, which is made if it is missing; call it on one rank.

    The file is whole or absent, whatever happens. One of the same step and width is replaced: a run
    that was resumed from an earlier step passes them again.

    Args:
        folder: Where the snapshots of one run are, and nothing of another run.
        step: Step of the average's last update, counted from 1 as in `decay_over`.
        sigma_rel: Relative width of the profile.
        tensors: The average by name; on any device. What is not on the CPU is copied there first, so
            that the host needs room for it.
        dtype: Floating-point tensors are stored so; None leaves them as they are.
        metadata: Plain data to keep with it.

    Returns:
        The file.

    Raises:
        ConfigError: *sigma_rel* lies outside of what a profile can have, or *metadata* is not plain data.
        ValueError: *step* is below 1.
        OSError: The file cannot be written.
    """
    import torch

    gamma_of(sigma_rel)
    if step < 1:
        raise ValueError(f"a snapshot cannot be of step {step}; steps are counted from 1")
    content = {
        "version": _VERSION,
        "step": int(step),
        "sigma_rel": float(sigma_rel),
        "tensors": {name: _storable(tensor, dtype) for name, tensor in tensors.items()},
        "metadata": _plain(metadata or {}),
    }
    path = folder / f"ema-step{step:010d}-sigma{float(sigma_rel)!r}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, _with_checksums():
        torch.save(content, file)
    log.debug("wrote %s", path)
    return path


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Return the snapshots in *folder*, by step and width; none if there is no such folder.

    Files of other names are ignored, unfinished ones among them. Nothing is opened.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = (_NAME.fullmatch(name) for name in names)
    return sorted(Snapshot(int(m[1]), float(m[2]), folder / m[0]) for m in matches if m)


def discard_after(folder: Path, step: int) -> list[Path]:
    """Remove the snapshots of steps later than *step*, and what killed writers left; one rank calls it.

    For a run that is resumed from *step*: what an earlier attempt made of later steps is of another
    history, and a sum with both is no average of either.

    Args:
        folder: Where the snapshots are; nothing happens if it is missing.
        step: The last one that stays; 0 is for a run that starts anew.

    Returns:
        The snapshots that were removed, by step and width.

    Raises:
        OSError: One cannot be removed.
    """
    remove_leftovers(folder)
    removed = [s.path for s in list_snapshots(folder) if s.step > step]
    for path in removed:
        path.unlink(missing_ok=True)
    if removed:
        sync_directory(folder)  # else a power failure could bring them back
        log.info("removed %d snapshots of the average after step %d", len(removed), step)
    return removed


@dataclass(frozen=True)
class Reconstruction:
    """What an average of a given width and step is the sum of."""

    step: int
    sigma_rel: float
    parts: tuple[tuple[Snapshot, float], ...]
    """Snapshots and their weights, by step and width; a single one of weight 1 if it is the target."""
    error: float
    """Of the profile, see `Fit.error`; 0 if a snapshot is the target."""

    def tensors(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Read the snapshots one after the other and add them up.

        Floating-point and complex tensors are summed, and returned, in their own precision or fp32,
        whichever is higher; others are those of the snapshot nearest to the step. All are on the CPU.
        The memory of one model is needed; the files are mapped.

        Raises:
            SnapshotNotFoundError: A file has gone.
            SnapshotError: One is damaged, of a newer version, or has other tensors than the rest.
        """
        nearest, _ = min(self.parts, key=lambda part: abs(part[0].step - self.step))
        total: dict[str, Tensor] = {}
        for done, (snapshot, weight) in enumerate(self.parts, 1):
            tensors = _read(snapshot)
            if done > 1:
                _check_alike(snapshot, tensors, self.parts[0][0], total)
            for name, tensor in tensors.items():
                if tensor.is_floating_point() or tensor.is_complex():
                    _add(total, name, tensor, weight)
                elif name not in total or snapshot == nearest:
                    total[name] = tensor.clone()
            if progress is not None:
                progress(done, len(self.parts))
        return total


def plan_reconstruction(
    folder: Path, *, sigma_rel: float, step: int | None = None, max_error: float = MAX_ERROR
) -> Reconstruction:
    """Find the sum of the snapshots in *folder* that has the given profile; one file is looked into.

    Args:
        folder: Where the snapshots of one run are.
        sigma_rel: Relative width of the profile that is wanted, whether or not it was tracked.
        step: Where it ends; None is the step of the last snapshot.
        max_error: Largest `Reconstruction.error` that is accepted.

    Raises:
        ConfigError: *sigma_rel* lies outside of what a profile can have.
        SnapshotNotFoundError: There is no snapshot.
        SnapshotError: The last one is damaged.
        ReconstructionError: The snapshots do not give this profile.
        ValueError: *step* is below 1.
    """
    gamma = gamma_of(sigma_rel)
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise SnapshotNotFoundError(
            f"there is no snapshot of an average in {folder}; give the folder that has the files "
            "`ema-step...-sigma....pt` of a run"
        )
    step = snapshots[-1].step if step is None else step
    for snapshot in snapshots:
        if snapshot.step == step and math.isclose(snapshot.sigma_rel, sigma_rel, rel_tol=1e-9):
            return Reconstruction(step, sigma_rel, ((snapshot, 1.0),), 0.0)
    fit = fit_profile(
        [s.step for s in snapshots],
        [gamma_of(s.sigma_rel) for s in snapshots],
        step,
        gamma,
        rounding=_rounding(_read(snapshots[-1])),
        max_error=max_error,
    )
    parts = tuple(zip(snapshots, fit.weights, strict=True))
    return Reconstruction(step, sigma_rel, parts, fit.error)


def reconstruct(
    folder: Path,
    *,
    sigma_rel: float,
    step: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the average of relative width *sigma_rel* at *step*, made of the snapshots in *folder*.

    A snapshot that has this very step and width is returned as it is, though in fp32 at least.

    Args:
        folder: As for `plan_reconstruction`.
        sigma_rel: As for `plan_reconstruction`.
        step: As for `plan_reconstruction`.
        progress: Called after each snapshot with the number of those read, and of all.

    Returns:
        As `Reconstruction.tensors`.

    Raises:
        NshTrainerError: As `plan_reconstruction` and `Reconstruction.tensors`.
    """
    return plan_reconstruction(folder, sigma_rel=sigma_rel, step=step).tensors(progress)


def _storable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """*tensor* on the CPU, in *dtype*, without the rest of the memory that it is a view of."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    stored = tensor.detach().to("cpu", wanted)
    is_part = stored.untyped_storage().nbytes() > stored.numel() * stored.element_size()
    return stored.clone() if is_part else stored


def _plain(metadata: Mapping[str, Any]) -> Any:
    try:
        return TypeAdapter(PlainData).validate_python(dict(metadata))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"the metadata of a snapshot is not plain data: {first['msg']}. Otherwise torch.load would "
            "not read the file without running code from it."
        ) from error


@contextlib.contextmanager
def _with_checksums() -> Generator[None]:
    """Have torch write the CRC-32 of each tensor, which a program may have switched off for its saves."""
    from torch import serialization

    before = serialization.get_crc32_options()
    serialization.set_crc32_options(compute_crc32=True)
    try:
        yield
    finally:
        serialization.set_crc32_options(compute_crc32=before)


def _read(snapshot: Snapshot) -> dict[str, Tensor]:
    """The tensors of *snapshot*, mapped from its file and checked against what was written."""
    import torch

    path = snapshot.path
    try:
        # torch does not look at the checksums, and a flipped bit would pass into the sum.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise _damaged(path, f"the checksum of {broken!r} differs")
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise SnapshotNotFoundError(
            f"{path} has gone; if the run is being resumed, try again when it has passed that step"
        ) from error
    except zipfile.BadZipFile as error:
        raise _damaged(path, str(error)) from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise _damaged(path, str(error).strip().partition("\n")[0]) from error
    return _check_content(snapshot, content)


def _damaged(path: Path, why: str) -> SnapshotError:
    return SnapshotError(
        f"{path} is damaged: {why}; remove it, and the others give the average as well as they can"
    )


def _check_content(snapshot: Snapshot, content: Any) -> dict[str, Tensor]:
    import torch

    values = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    version = values.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise SnapshotError(
            f"{snapshot.path} has format version {version}, and this nshtrainer-ema reads version "
            f"{_VERSION}; update nshtrainer-ema"
        )
    tensors: Any = values.get("tensors")
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in cast("dict[str, Any]", tensors).values()
    ):
        raise SnapshotError(f"{snapshot.path} is no snapshot of an average; move it elsewhere")
    if (values.get("step"), values.get("sigma_rel")) != (snapshot.step, snapshot.sigma_rel):
        raise SnapshotError(
            f"{snapshot.path} holds step {values.get('step')} with sigma_rel="
            f"{values.get('sigma_rel')}, and its name says otherwise; give it its name back"
        )
    return cast("dict[str, Tensor]", tensors)


def _check_alike(
    snapshot: Snapshot, tensors: Mapping[str, Tensor], first: Snapshot, total: Mapping[str, Tensor]
) -> None:
    """Refuse a snapshot of another model than that of *first*."""
    for name in [*total, *tensors]:
        here = tuple(tensors[name].shape) if name in tensors else None
        there = tuple(total[name].shape) if name in total else None
        if here != there:
            raise SnapshotError(
                f"{snapshot.path} does not belong to {first.path.name}: {name!r} is "
                f"{_shape_text(here)} in the one and {_shape_text(there)} in the other. Snapshots in "
                "a folder are of one run; move those of another away."
            )


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _add(total: dict[str, Tensor], name: str, tensor: Tensor, weight: float) -> None:
    import torch

    if name not in total:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        total[name] = tensor.to(dtype, copy=True).mul_(weight)
    else:
        total[name].add_(tensor, alpha=weight)


def _rounding(tensors: Mapping[str, Tensor]) -> float:
    """The largest relative rounding error among *tensors*."""
    import torch

    inexact: Sequence[Tensor] = [
        t for t in tensors.values() if t.is_floating_point() or t.is_complex()
    ]
    return max((torch.finfo(t.dtype).eps / 2 for t in inexact), default=0.0)
