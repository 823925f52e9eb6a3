"""The training that faults befall: three linear layers whose checkpoints prove themselves.

It saves after every step. What happens is told through a pipe, one JSON object a line, so that
whoever waits need not guess from the clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import os
import select
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from nshtrainer import Trainer, TrainerConfig

from .check import Found, digest_of, look, survey

__all__ = ["Model", "Plan", "Probe", "end", "fork", "listen", "survey_of", "train"]

Subject = Literal["ours", "lightning"]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.mkdir", "os.truncate"}
"""Audit events that change a file system, beside `open` for writing; they come before the change."""


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        root: Folder of the project.
        subject: Whose checkpoints.
        size: Of a checkpoint, in MB.
        max_steps: Optimizer steps, over all processes of a run.
        tempdir: Folder for temporary files; None is the system's.
        resume: Go on from `last`; Lightning starts over where that does not load.
        async_save: Only for ours.
        on_save_error: Only for ours.
        kill_step: Count the file events of the save after this step, and say how many there are.
        kill_event: Die at this one of them, counted from 1; 0 survives them all.
        only_start: End the process before the first step.
    """

    root: Path
    subject: Subject = "ours"
    size: float = 1.0
    max_steps: int = 1_000_000
    tempdir: Path | None = None
    resume: bool = False
    async_save: bool = False
    on_save_error: Literal["raise", "warn"] = "raise"
    kill_step: int | None = None
    kill_event: int = 0
    only_start: bool = False

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        if self.subject == "lightning":
            return self.root / "checkpoint"
        return self.root / "nshtrainer_logs" / "r" / "checkpoint"

    @property
    def last(self) -> Path:
        """The documented name of the newest checkpoint."""
        return self.folder / "last.ckpt"


def survey_of(plan: Plan) -> Found:
    """What a reader finds of the run of *plan*; Lightning's best has no name of its own."""
    if plan.subject == "lightning":
        return survey(plan.folder, "last.ckpt", "*.ckpt", has_sidecars=False)
    return survey(plan.folder, "last.ckpt", "best_val_loss.ckpt")


class Model(pl.LightningModule):
    """Three linear layers with Adam, as wide as the *size* of a checkpoint in MB asks for."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = max(4, math.isqrt(int(size * 1e6 / 36)))  # 3 layers x 3 copies x 4 bytes
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(3)))
        self.width = width

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layers(batch[0]).pow(2).mean()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        # Two of three validations are a new best: a save of both, then of last alone.
        self.log("val/loss", 1.0 / (1 + step) + (step % 3 == 2))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["proof"] = {
            "step": self.trainer.global_step,
            "sha256": digest_of(checkpoint["state_dict"]),
        }

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Probe(Callback):
    """Tells what happens, and counts file events where the plan asks for it.

    Args:
        plan: How to train.
        tell: Takes what is told.
        at: Steps made -> what to do before the next one.
    """

    def __init__(
        self,
        plan: Plan,
        tell: Callable[[dict[str, Any]], None],
        at: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        self.plan, self.tell, self.at = plan, tell, dict(at or {})
        self.start: int | None = None
        self.events = _FileEvents(plan.root, plan.tempdir)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.start is None:
            self.start = step
            found = survey_of(self.plan)
            self.tell(
                {
                    "event": "start",
                    "step": step,
                    "source": str(trainer.ckpt_path or ""),
                    "files": sorted(found.files),
                    "leftovers": found.leftovers + found.in_flight,
                    "faults": found.faults,
                    "last": found.last.step,
                    "newest": found.newest,
                }
            )
            if self.plan.only_start:
                os._exit(0)
        elif step == self.start + 1:
            self.tell({"event": "saved", "step": step})
        if (action := self.at.pop(step, None)) is not None:
            action()
        if self.plan.kill_step is not None:
            self._count(step - self.start)

    def _count(self, done: int) -> None:
        if done == self.plan.kill_step:
            self.events.arm(self.plan.kill_event)
        elif self.plan.kill_step is not None and done == self.plan.kill_step + 1:
            self.tell({"event": "counted", "events": self.events.disarm()})


class _FileEvents:
    """Counts what this process does to files below *folders*, and kills it at one of them."""

    def __init__(self, *folders: Path | None) -> None:
        self._folders = tuple(str(f) for f in folders if f is not None)
        self._seen: list[str] | None = None
        self._deadly = 0

    def arm(self, deadly: int) -> None:
        """Count from now; die at the *deadly*-th, counted from 1."""
        self._seen, self._deadly = [], deadly
        sys.addaudithook(self._hear)

    def disarm(self) -> list[str]:
        """Stop counting; returns the events that were seen."""
        seen, self._seen = self._seen or [], None
        return seen

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self._seen is None or not self._changes(event, args):
            return
        self._seen.append(event)
        if len(self._seen) == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def _changes(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            if not (isinstance(args[2], int) and args[2] & WRITES):
                return False
        elif event not in EVENTS:
            return False
        return any(isinstance(a, (str, os.PathLike)) and self._is_below(a) for a in args)

    def _is_below(self, path: str | os.PathLike[str]) -> bool:
        return os.path.abspath(os.fspath(path)).startswith(self._folders)


def train(plan: Plan, probe: Probe, *others: Callback) -> pl.Trainer:
    """Train as *plan* says, with *others* as further callbacks; what fails is raised."""
    if plan.tempdir is not None:
        tempfile.tempdir = str(plan.tempdir)
    model = Model(plan.size)
    data = DataLoader(TensorDataset(torch.ones(4, model.width)), batch_size=1)
    held_out = DataLoader(TensorDataset(torch.ones(1, model.width)), batch_size=1)
    make = _lightning if plan.subject == "lightning" else _ours
    trainer = make(plan, [probe, *others])
    trainer.fit(model, data, held_out, ckpt_path=_source(plan))
    return trainer


def _source(plan: Plan) -> str | None:
    if not plan.resume:
        return None
    if plan.subject == "ours":
        return "last"
    return str(plan.last) if look(plan.last).is_ok else None


QUIET: dict[str, Any] = {
    "val_check_interval": 1,
    "accelerator": "cpu",
    "devices": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _ours(plan: Plan, callbacks: list[Callback]) -> pl.Trainer:
    config = TrainerConfig.model_validate(
        {
            "id": "r",
            "loggers": [],
            "max_steps": plan.max_steps,
            "primary_metric": {"name": "val/loss", "mode": "min"},
            "directory": {"project_root": plan.root},
            "checkpoint_saving": {
                "async_save": plan.async_save,
                "on_save_error": plan.on_save_error,
            },
            **QUIET,
        }
    )
    return Trainer(config, callbacks=callbacks)


def _lightning(plan: Plan, callbacks: list[Callback]) -> pl.Trainer:
    best = ModelCheckpoint(
        plan.folder, filename="best-{step}", monitor="val/loss", save_last=True, save_top_k=2
    )
    return pl.Trainer(
        default_root_dir=plan.root,
        max_steps=plan.max_steps,
        logger=False,
        callbacks=[*callbacks, best],
        **QUIET,
    )


PATIENCE = 120.0
"""Seconds without a word from a child before it counts as hanging."""


@dataclass
class Child:
    """A forked process, and the file descriptor that what it tells comes from."""

    pid: int
    pipe: int


def fork(work: Callable[[Callable[[dict[str, Any]], None]], None], log: Path) -> Child:
    """Do *work* in a process of its own, forked from this one, which therefore has torch loaded.

    Args:
        work: Gets the function that tells; ends with code 0, or 1 if it raises.
        log: Takes what the process prints and logs.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _die_with_parent()
        os.close(reading)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        def tell(what: dict[str, Any]) -> None:
            os.write(writing, json.dumps(what).encode() + b"\n")

        work(tell)
        code = 0
    except BaseException:  # noqa: BLE001 -- told by the exit code; the parent goes on by itself
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    """Where the system can (Linux): a training without end must not outlive who watches it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def listen(child: Child) -> Iterator[dict[str, Any]]:
    """What *child* tells, until it ends or says nothing for too long."""
    text = b""
    while select.select([child.pipe], [], [], PATIENCE)[0]:
        more = os.read(child.pipe, 1 << 16)
        if not more:
            return
        *lines, text = (text + more).split(b"\n")
        yield from map(json.loads, lines)


def end(child: Child) -> int:
    """Kill *child* and all it started, if it still lives; returns how it ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    return os.waitstatus_to_exitcode(status)
