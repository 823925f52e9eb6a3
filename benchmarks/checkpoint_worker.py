"""One training run in a process of its own that saves when it is told to, and times each save.

Needs nothing of this repository unless it saves with it: it also runs in an environment where only
another release is installed, as a script with the address of a socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from typing_extensions import override

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["KINDS", "Job", "Reply", "serve"]

_NUM_LAYERS = 8
_EXTENSION, _SIDECAR = ".ckpt", ".metadata.json"


@dataclass(frozen=True)
class Job:
    """What a process trains and how it saves.

    Attributes:
        kind: A name of `KINDS`.
        num_bytes: Size of the weights with Adam's state.
        folder: Empty; everything is written below it.
        num_present: Committed checkpoints that lie in the callback's folder at each save.
    """

    kind: str
    num_bytes: int
    folder: str
    num_present: int = 0


class Reply(NamedTuple):
    """What one save took."""

    wall: float
    """Seconds for which training stood still."""
    cpu: float
    extra_bytes: int
    """Most memory held during the save, over what was held before it."""
    state_bytes: int


class Net(pl.LightningModule):
    """Square linear layers; a step costs little beside Adam's own."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        width = max(1, round((num_bytes / (4 * 3 * _NUM_LAYERS)) ** 0.5))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(_NUM_LAYERS))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([p.mean() for p in self.parameters()]).sum()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # This hook comes after that of every callback.
        for callback in _callbacks_of(self.trainer):
            if isinstance(callback, Asked) and not callback.is_ours:
                callback.answer()


def _callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    return cast("list[Callback]", trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue] -- set in Lightning's connector


class _Batches:
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.zeros(1)


class Asked(Callback):
    """Stands before the callback that saves: waits until a save is asked for, and starts the clock."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self.connection, self.job = connection, job
        self.folder = Path(job.folder)
        self.is_async = job.kind == "async"
        self.is_ours = job.kind in ("ours", "async")
        self.written = threading.Event()
        self.before = (0.0, 0.0, 0)
        self.state_bytes = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_ours:
            trainer.callbacks = [*_callbacks_of(trainer), _After(self)]  # pyright: ignore[reportAttributeAccessIssue] -- set in Lightning's connector

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        try:
            question = self.connection.recv()
        except EOFError:
            os._exit(0)  # nothing here is worth an orderly end
        state = _state(pl_module, trainer.optimizers[0])
        self.state_bytes = sum(t.nbytes for t in _tensors(state))
        self._tidy()
        self.written.clear()
        gc.collect()
        gc.disable()
        os.sync()
        if question == "memory":
            _give_back()
        held = _forget_peak()
        self.before = time.perf_counter(), time.process_time(), held

    def answer(self) -> None:
        """Stop the clock, and tell."""
        wall, cpu = time.perf_counter(), time.process_time()
        gc.enable()
        extra = _peak() - self.before[2]
        if self.is_async:
            self.written.wait()  # the next one to be measured has the disk for itself
        self.connection.send(
            tuple(
                Reply(wall - self.before[0], cpu - self.before[1], max(0, extra), self.state_bytes)
            )
        )

    def on_checkpoint_saved(self, *_args: Any) -> None:
        """Hear that a file was committed, perhaps in the background."""
        self.written.set()

    def _tidy(self) -> None:
        """Leave as many checkpoints as the job says: the last one, cloned, or none."""
        files = [f for f in self.folder.rglob(f"*{_EXTENSION}*") if not f.is_symlink()]
        clones = [f for f in files if f.name.startswith("clone")]
        for file in files:
            if file not in clones and (clones or not self.job.num_present):
                file.unlink()
        if self.job.num_present and not clones:
            self._clone([f for f in files if f.suffix == _EXTENSION])

    def _clone(self, checkpoints: list[Path]) -> None:
        for original in checkpoints[:1]:
            sidecar = original.with_name(original.name + _SIDECAR)
            content = json.loads(sidecar.read_text())
            for number in range(self.job.num_present):
                clone = original.with_name(f"clone{number}{_EXTENSION}")
                os.link(original, clone)
                content["checkpoint_filename"] = clone.name
                clone.with_name(clone.name + _SIDECAR).write_text(json.dumps(content, indent=2))
            original.unlink()
            sidecar.unlink()


class _After(Callback):
    """Stops the clock after ours, which save when all hooks of a batch have run, the module's too."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def on_train_batch_settled(self, *_args: Any) -> None:
        """Called after the checkpoint callbacks, as the last of the list."""
        self.asked.answer()


def _give_back() -> None:
    """Return freed memory to the system, where the C library can: reusing it would not be seen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> int:
    """Bytes held now, from where the peak is counted anew if the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _state(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in cast("dict[Any, Any]", value).values():
            yield from _tensors(inner)


class Bare(Callback):
    """`torch.save` and `fsync`, with nothing around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        path = self.folder / f"{trainer.global_step}{_EXTENSION}"
        torch.save(_state(pl_module, trainer.optimizers[0]), path)
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)


class Copy(Callback):
    """A copy of the state to CPU memory, into the memory of the last copy."""

    def __init__(self) -> None:
        self.copies: list[Tensor] = []

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        tensors = list(_tensors(_state(pl_module, trainer.optimizers[0])))
        self.copies = self.copies or [torch.empty_like(t, device="cpu") for t in tensors]
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor.detach())


_SETTINGS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _plain(job: Job, asked: Callback, saving: Callback) -> pl.Trainer:
    return pl.Trainer(
        callbacks=[asked, saving],
        logger=False,
        enable_checkpointing=isinstance(saving, ModelCheckpoint),
        default_root_dir=job.folder,
        max_epochs=1,
        **_SETTINGS,
    )


def _bare(job: Job, asked: Callback) -> pl.Trainer:
    return _plain(job, asked, Bare(Path(job.folder)))


def _copy(job: Job, asked: Callback) -> pl.Trainer:
    return _plain(job, asked, Copy())


def _lightning(job: Job, asked: Callback) -> pl.Trainer:
    saving = ModelCheckpoint(job.folder, save_top_k=-1, every_n_train_steps=1)
    return _plain(job, asked, saving)


def _ours(job: Job, asked: Callback) -> pl.Trainer:
    from nshtrainer import Trainer, TrainerConfig
    from nshtrainer.trainer.config import SLOTS

    last = {
        "name": "last_checkpoint",
        "every_n_steps": 1,
        "topk": "all",
        "on_validation_end": False,
        "on_train_end": False,
    }
    saving = {"checkpoint_callbacks": [last], "async_save": job.kind == "async"}
    config = TrainerConfig.model_validate(
        {
            **dict.fromkeys(SLOTS),
            **_SETTINGS,
            "checkpoint_saving": saving,
            "directory": {"project_root": job.folder},
            "loggers": [],
            "max_epochs": 1,
        }
    )
    return Trainer(config, callbacks=[asked])


def _existing(job: Job, asked: Callback) -> pl.Trainer:
    nshtrainer: Any = importlib.import_module("nshtrainer")  # the release in this environment
    configs: Any = nshtrainer.configs
    last = configs.LastCheckpointCallbackConfig(save_on_time_interval=timedelta(0), topk="all")
    config = configs.TrainerConfig(
        directory=configs.DirectoryConfig(project_root=job.folder),
        checkpoint_saving=configs.CheckpointSavingConfig(checkpoint_callbacks=[last]),
        loggers=[],
        accelerator="cpu",
        devices="auto",  # one process
        max_epochs=1,
        lightning_kwargs={"enable_progress_bar": False, "enable_model_summary": False},
    )
    return nshtrainer.Trainer(config.with_id("existing"), callbacks=[asked])


KINDS: dict[str, Callable[[Job, Callback], pl.Trainer]] = {
    "bare": _bare,
    "copy": _copy,
    "lightning": _lightning,
    "ours": _ours,
    "async": _ours,
    "existing": _existing,
}
"""How a process may save -> the trainer that saves so after each step."""


def serve(connection: Connection, values: dict[str, Any]) -> None:
    """Train for ever as the `Job` of *values* says; save once for each message, `time` or `memory`, and reply.

    Ends the process when the other side closes the connection.
    """
    job = Job(**values)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.dup2(2, 1)  # what is printed is no part of the results
    asked = Asked(connection, job)
    KINDS[job.kind](job, asked).fit(Net(job.num_bytes), _Batches())


if __name__ == "__main__":
    socket, text = sys.argv[1:]
    serve(cast("Connection", Client(socket)), asdict(Job(**json.loads(text))))
