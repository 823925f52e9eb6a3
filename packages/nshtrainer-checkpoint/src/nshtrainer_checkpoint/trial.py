"""A save before the first step, to find out early what would fail after hours."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nshtrainer.errors import ConfigError
from nshtrainer.files import temporary_path
from nshtrainer.quantities import size_text

from . import objects
from .metadata import digest
from .places import Place
from .ranks import agree
from .storage import discard, temporary_for
from .streaming import streaming
from .writer import Writer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Trial", "check_writable", "try_out"]

log = logging.getLogger(__name__)

_STATES_OF_ADAM = 2


@dataclass(frozen=True)
class Trial:
    """What a trial found."""

    size: int
    """Bytes of a checkpoint once the optimizers have their state."""
    seconds: float
    """What the trial's own save took; without that state where training starts from scratch."""
    wanted: int
    """How many checkpoints there are to be at once, one more than is kept."""
    free: int | None
    """Bytes that are free; None where that cannot be asked."""


def check_writable(writer: Writer) -> None:
    """Put a file where the checkpoints go, and take it away again.

    Raises:
        ConfigError: That is not possible; the message names the folder and the cause.
    """
    place = writer.folder
    try:
        if isinstance(place, Path):
            while not place.exists() and place != place.parent:
                place = place.parent  # nothing is made before there is something to save
            probe = temporary_path(place / "writable")
            probe.touch()
            probe.unlink()
        else:
            distant = place / f".writable-{uuid.uuid4().hex}"
            objects.write(distant, b"")
            objects.unlink(distant)
    except OSError as error:
        raise ConfigError(
            f"{writer.identity} cannot write to {place} ({error.strerror or error}), so that no "
            f"checkpoint could be saved in {writer.folder}; make it writable, or choose another "
            "`dirpath` (or the run's `directory`)"
        ) from error


def try_out(trainer: Trainer, writer: Writer, kept: Iterable[int]) -> Trial:
    """Save once into the folder of *writer*, delete it, and see whether there is room.

    A collective: call it on every rank.

    Args:
        trainer: At the start of training.
        writer: One that saves more than weights, if there is one.
        kept: How many checkpoints each callback keeps.

    Raises:
        ConfigError: It cannot be written, or there is no room; says how large a checkpoint is.
    """
    wanted = sum(kept) + 1
    temporary = Path(agree(trainer, lambda: str(temporary_for(writer.ensure_folder() / "trial"))))
    begin = time.perf_counter()
    try:
        with streaming(trainer) as stream:
            trainer.save_checkpoint(temporary, writer.weights_only)

        def judge() -> Trial:
            size = (stream.finish() or digest(temporary))[0]
            seconds = time.perf_counter() - begin
            if not writer.weights_only:
                size += sum(_missing_state(o) for o in trainer.optimizers)
            return _judged(writer, Trial(size, seconds, wanted, _free(writer.folder)))

        try:
            return agree(trainer, judge)
        except OSError as error:
            raise ConfigError(
                f"no checkpoint could be written to {writer.folder} ({error}); make room, or "
                "choose another `dirpath`"
            ) from error
    finally:
        if trainer.is_global_zero:
            with contextlib.suppress(OSError):
                discard(temporary)


def _judged(writer: Writer, trial: Trial) -> Trial:
    present = min(len(writer.present()), trial.wanted)
    needed = trial.size * max(trial.wanted - present, 1)
    if trial.free is not None and trial.free < needed:
        raise ConfigError(
            f"a checkpoint will have about {size_text(trial.size)} and up to {trial.wanted} are to "
            f"be kept at once, which needs {size_text(needed)}, but {size_text(trial.free)} are free "
            f"at {writer.folder}; make room, lower `topk`, or choose another `dirpath`"
        )
    room = "" if trial.free is None else f"; {size_text(trial.free)} are free"
    log.info(
        "a checkpoint will have about %s, a trial took %.1f s, up to %s are kept at once%s",
        size_text(trial.size),
        trial.seconds,
        trial.wanted,
        room,
    )
    return trial


def _free(folder: Place) -> int | None:
    if not isinstance(folder, Path):
        return None
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _missing_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that *optimizer* makes at its first step."""
    missing = [
        p for g in optimizer.param_groups for p in g["params"] if p not in optimizer.state
    ]  # fmt: skip
    each = _states_per_parameter(optimizer) if missing else 0
    return each * sum(p.numel() * p.element_size() for p in missing if p.requires_grad)


def _states_per_parameter(optimizer: torch.optim.Optimizer) -> int:
    """How many tensors of a parameter's size it keeps, seen from a step with one small parameter."""
    parameter = torch.zeros(3, 5, requires_grad=True)
    parameter.grad = torch.zeros(3, 5)
    try:
        allowed = inspect.signature(type(optimizer).__init__).parameters
        options: dict[str, Any] = {k: v for k, v in optimizer.defaults.items() if k in allowed}
        small: Any = type(optimizer)([parameter], **options)
        small.step()
        state = small.state[parameter].values()
        return sum(isinstance(v, torch.Tensor) and v.numel() == math.prod((3, 5)) for v in state)
    except Exception as error:  # noqa: BLE001 -- an estimate of a stranger's optimizer must not fail a run
        log.debug("the state of %s is not known (%s)", type(optimizer).__name__, error)
        return _STATES_OF_ADAM
