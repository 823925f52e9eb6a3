"""File systems that fail under a training, and what is left then.

Each case is a process of its own. A full or read-only file system is a small tmpfs, mounted where
nobody else sees it; where that is not allowed, every opening of a file for writing fails with the
same error, as it does on a disk without free inodes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback

from .child import WRITES, Child, Plan, Probe, fork, survey_of, train

__all__ = ["CASES", "Case", "start_case"]

AT, STEPS = 2, 4
"""The fault comes after this step; training is to make so many."""

Kind = Literal["full", "refused", "quota", "read_only", "blocked", "removed"]


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        kind: `full`: no space; `refused`: the same, by refusing to open; `quota`: no file may be as
            large as a checkpoint; `blocked`: a file lies where a folder was; `removed`: the folder
            is gone.
        on_save_error: What the training was told to do then.
        passes: Whether the fault ends by itself: in a second, or at the second refusal.
    """

    kind: Kind
    on_save_error: Literal["raise", "warn"] = "raise"
    passes: bool = False

    @property
    def name(self) -> str:
        """For people and for tests."""
        return "-".join([self.kind, self.on_save_error, *(["passing"] if self.passes else [])])


CASES = (
    Case("full"),
    Case("full", "warn"),
    Case("full", passes=True),
    Case("refused"),
    Case("refused", "warn"),
    Case("refused", passes=True),
    Case("quota"),
    Case("quota", "warn"),
    Case("read_only"),
    Case("read_only", "warn"),
    Case("blocked"),
    Case("blocked", "warn"),
    Case("removed"),
)


def start_case(case: Case, root: Path) -> Child:
    """Start *case* below *root*, an empty folder; it tells one object with the result."""
    plan = Plan(root / "project", max_steps=STEPS, on_save_error=case.on_save_error)
    plan.root.mkdir()
    return fork(lambda tell: tell(_live(case, plan)), root / "log.txt")


def _live(case: Case, plan: Plan) -> dict[str, Any]:
    """Train under the fault, look at what is left, end the fault, and go on."""
    is_mounted = case.kind in ("full", "read_only") and _mount(plan.root)
    fault = _FAULTS[case.kind](plan, case, is_mounted)
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    logging.getLogger("nshtrainer_checkpoint").addHandler(heard)
    told: list[dict[str, Any]] = []
    probe = Probe(plan, told.append, {AT: fault.begin})
    error, step = _attempt(plan, probe)
    left = survey_of(plan)
    fault.end()
    result: dict[str, Any] = {
        "event": "result",
        "case": asdict(case),
        "mounted": is_mounted,
        "error": error,
        "step": step,
        "heard": heard.texts,
        "last": list(left.last),
        "best": list(left.best),
        "faults": left.faults,
        "newest": left.newest,
    }
    again: list[dict[str, Any]] = []
    resumed = replace(plan, resume=True, max_steps=STEPS + 2)
    error, step = _attempt(resumed, Probe(resumed, again.append))
    after = survey_of(plan)
    result["again"] = {
        "start": next((t for t in again if t["event"] == "start"), None),
        "error": error,
        "step": step,
        "last": list(after.last),
        "faults": after.faults,
        "leftovers": after.leftovers,
        "files": sorted(after.files),
    }
    return result


def _attempt(plan: Plan, probe: Probe) -> tuple[list[str] | None, int]:
    counter = _Counter()
    try:
        train(plan, probe, counter)
    except BaseException as error:  # noqa: BLE001 -- what came out is the result
        return [type(error).__name__, str(error)], counter.step
    return None, counter.step


class _Counter(Callback):
    """Knows how many steps were made, whatever came of the training."""

    step = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.step = trainer.global_step


class _Heard(logging.Handler):
    """Keeps the warnings and errors that a person would read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.getMessage()}"
        if text not in self.texts[-1:]:
            self.texts.append(text)


class _Fault:
    """Does nothing: the base of what goes wrong."""

    def __init__(self, plan: Plan, case: Case, is_mounted: bool) -> None:
        self.plan, self.case, self.is_mounted = plan, case, is_mounted

    def begin(self) -> None:
        """Let it happen."""

    def end(self) -> None:
        """Undo it; may be called twice."""


class _Refusing(_Fault):
    """Opening a file for writing fails, by an audit hook that raises."""

    code = errno.ENOSPC

    def __init__(self, plan: Plan, case: Case, is_mounted: bool) -> None:
        super().__init__(plan, case, is_mounted)
        self._is_on, self._refusals = False, 0

    def begin(self) -> None:
        self._is_on = True
        sys.addaudithook(self._hear)

    def end(self) -> None:
        self._is_on = False

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_on or event != "open" or not str(args[0]).startswith(str(self.plan.folder)):
            return
        if isinstance(args[2], int) and args[2] & WRITES:
            self._refusals += 1
            self._is_on = not (self.case.passes and self._refusals == 2)
            raise OSError(self.code, os.strerror(self.code), str(args[0]))


class _Full(_Refusing):
    """A filler leaves half a checkpoint of space."""

    def begin(self) -> None:
        if not self.is_mounted:
            return super().begin()
        self._filler = self.plan.root / "filler"
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        os.truncate(self._filler, self._filler.stat().st_size - 500_000)
        if self.case.passes:
            threading.Timer(1.0, self.end).start()
        return None

    def end(self) -> None:
        super().end()
        if self.is_mounted:
            self._filler.unlink(missing_ok=True)


class _ReadOnly(_Refusing):
    """The file system is mounted anew, read-only."""

    code = errno.EROFS

    def begin(self) -> None:
        if self.is_mounted:
            _mount(self.plan.root, _MS_REMOUNT | _MS_RDONLY)
        else:
            super().begin()

    def end(self) -> None:
        super().end()
        if self.is_mounted:
            _mount(self.plan.root, _MS_REMOUNT)


class _Quota(_Fault):
    """No file may be larger than half a checkpoint; Python ignores the signal for it."""

    def begin(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))

    def end(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class _Blocked(_Fault):
    """The folder of the last checkpoints was moved away, and a file has its name."""

    def begin(self) -> None:
        self._folder = self.plan.folder / "last"
        self._aside = self.plan.root / "aside"
        self._folder.rename(self._aside)
        self._folder.write_text("in the way")

    def end(self) -> None:
        if self._aside.exists():
            self._folder.unlink()
            self._aside.rename(self._folder)


class _Removed(_Fault):
    """The folder of all checkpoints was deleted."""

    def begin(self) -> None:
        shutil.rmtree(self.plan.folder)


_FAULTS: dict[Kind, Callable[[Plan, Case, bool], _Fault]] = {
    "full": _Full,
    "refused": _Refusing,
    "quota": _Quota,
    "read_only": _ReadOnly,
    "blocked": _Blocked,
    "removed": _Removed,
}


# ---- a file system of its own ---------------------------------------------------------------

_CLONE_NEWNS, _MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20000, 1, 32, 0x4000, 0x40000


def _mount(folder: Path, flags: int = 0) -> bool:
    """Mount a tmpfs of 16 MB that only this process and its children see; False if not allowed."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if not flags & _MS_REMOUNT and (
            libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, 0)
        ):
            return False
        return not libc.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, b"size=16m")
    except (OSError, AttributeError):  # not Linux
        return False
