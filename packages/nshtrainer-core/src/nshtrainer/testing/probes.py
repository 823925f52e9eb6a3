"""Callbacks and wrappers with which the clauses look into a run, and make it fail."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from typing_extensions import override

from .syncs import HostSyncs
from .traces import random_states

__all__ = [
    "EndOfStep",
    "Observer",
    "PlantedError",
    "SaveEachEpoch",
    "StartOfStep",
    "plant_failure",
    "quiet_and_seeded",
    "states_of",
]


class PlantedError(RuntimeError):
    """Raised on purpose by a clause, inside the user's module."""


def plant_failure(module: LightningModule, hook: str, at: int) -> PlantedError:
    """Let call number *at* (from 0) of the module's *hook* raise; returns what it will raise."""
    error = PlantedError(f"planted in {hook}")
    original: Callable[..., Any] = getattr(module, hook)
    calls = iter(range(sys.maxsize))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    module.__dict__[hook] = failing
    return error


@contextlib.contextmanager
def quiet_and_seeded() -> Generator[None, None, None]:
    """Run the block without warnings and from fixed random states; both are put back after it.

    Warnings are no clause: Lightning has many for tiny runs, and they differ between versions.
    """
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state: Any = None if numpy is None else numpy.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            random.seed(0)
            torch.default_generator.manual_seed(0)
            if numpy is not None:
                numpy.random.seed(0)
            yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def states_of(trainer: Trainer) -> dict[str, Any]:
    """State key -> copy of the state of each callback that has one."""
    callbacks = cast("list[Callback]", trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue] -- set by Lightning's connector
    return {c.state_key: copy.deepcopy(state) for c in callbacks if (state := c.state_dict())}


class Observer(Callback):
    """Stands first in the list; notes what is there when training starts and when it ends.

    Attributes:
        optimizers: Those of the run.
        restored: The callbacks' states after a checkpoint was loaded, before any other hook.
        states: The callbacks' states when training ended.
        random: The states of the random generators when training ended.
    """

    def __init__(self) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self.restored: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self.random: dict[str, Any] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restored = states_of(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizers = list(trainer.optimizers)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.states = states_of(trainer)
        self.random = random_states()


class SaveEachEpoch(Checkpoint):
    """Saves `epoch=N.ckpt` after each epoch, when and where Lightning's own checkpoints do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path(trainer.current_epoch))

    def path(self, epoch: int) -> Path:
        """Where the checkpoint of *epoch* is."""
        return self.folder / f"epoch={epoch}.ckpt"


class StartOfStep(Callback):
    """Stands first and opens the section of each training step but the first, which may set up."""

    def __init__(self, syncs: HostSyncs) -> None:
        self.syncs = syncs

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.syncs.section = batch_idx or None


class EndOfStep(Checkpoint):
    """Stands last (Lightning puts checkpoints there) and closes the section."""

    def __init__(self, syncs: HostSyncs) -> None:
        self.syncs = syncs

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.syncs.section = None
