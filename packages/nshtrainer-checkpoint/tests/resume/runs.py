"""Training that draws random numbers wherever it can, and a callback that saves at one moment."""

# ruff: noqa: S311 -- these random numbers are the subject, and no secret
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nshtrainer_checkpoint.resume import ResumeState

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Noisy(Dataset[Any]):
    """Samples with fresh noise from torch, Python and NumPy each time."""

    def __init__(self, size: int = 24) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        return index, torch.full((4,), index / 10) + 0.1 * noise


class Stream(IterableDataset[Any]):
    """An endless-looking stream of unknown length, shuffled through a buffer as it goes."""

    def __init__(self, size: int = 24) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        buffer: list[int] = []
        for index in range(self.size):
            buffer.append(index)
            if len(buffer) > 6:
                yield self._item(buffer.pop(random.randrange(len(buffer))))
        while buffer:
            yield self._item(buffer.pop(random.randrange(len(buffer))))

    def _item(self, index: int) -> Any:
        return index, torch.full((4,), index / 10) + 0.1 * torch.randn(4)


class Model(pl.LightningModule):
    """Dropout, noise, and draws in hooks; remembers which samples it saw, batch by batch."""

    def __init__(self, *, plateau: bool = False, acts_late: bool = False) -> None:
        super().__init__()
        self.acts_late = acts_late
        self.register_buffer("late", torch.zeros(()))
        torch.manual_seed(0)  # the weights only; whoever fits sets what counts
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))  # fmt: skip
        self.plateau = plateau
        self.seen: list[Any] = []

    def _loss(self, batch: Any) -> torch.Tensor:
        x = batch["a"][1] + batch["b"][1].mean(0) if isinstance(batch, dict) else batch[1]
        return (self.net(x) - 1).pow(2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first = batch["a"][0].tolist() + batch["b"][0].tolist() if isinstance(batch, dict) else batch[0].tolist()  # fmt: skip
        self.seen.append((self.current_epoch, batch_idx, first))
        return self._loss(batch) * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.seen.append(("validation", batch[0].tolist()))
        self.log("val/loss", self._loss(batch) + 0.01 * torch.rand(()))

    def on_train_epoch_start(self) -> None:
        torch.rand(3)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.acts_late:
            self.late += torch.rand(())

    def on_validation_end(self) -> None:
        if self.acts_late and not self.trainer.sanity_checking:
            self.late *= 1 + torch.rand(())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        if self.plateau:
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)  # fmt: skip
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}  # fmt: skip
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
        return [optimizer], [scheduler]


class SaveAt(Checkpoint):
    """Saves once, at the first *hook* with *step* optimizer steps done; then dies if *dies*."""

    def __init__(self, path: Path, hook: str = "", step: int = 0, *, dies: bool = False) -> None:
        self.path, self.hook, self.step, self.dies = path, hook, step, dies
        self.saved_from = -1

    def setup(self, trainer, pl_module, stage) -> None:
        self.state = ResumeState.attach(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["resume"] = self.state.collect(trainer)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.state.restore(trainer, checkpoint["resume"])

    def _at(self, trainer, hook: str) -> None:
        if hook == self.hook and trainer.global_step == self.step and self.saved_from < 0:
            if trainer.sanity_checking:
                return
            self.saved_from = len(trainer.lightning_module.seen)
            trainer.save_checkpoint(self.path)
            if self.dies:
                raise DeadError

    def on_train_batch_end(self, trainer, *args) -> None:
        self._at(trainer, "batch")

    def on_validation_start(self, trainer, pl_module) -> None:
        self._at(trainer, "validation_start")

    def on_validation_end(self, trainer, pl_module) -> None:
        self._at(trainer, "validation_end")

    def on_train_batch_settled(self, trainer, pl_module) -> None:
        self._at(trainer, "batch_settled")

    def on_validation_settled(self, trainer, pl_module) -> None:
        self._at(trainer, "validation_settled")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._at(trainer, "epoch_end")

    def on_train_end(self, trainer, pl_module) -> None:
        self._at(trainer, "train_end")


class DeadError(Exception):
    """The process is killed."""


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def outcome(trainer: pl.Trainer) -> dict[str, Any]:
    """All that must be the same, the next random numbers too."""
    model = trainer.lightning_module
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "steps": (trainer.global_step, trainer.current_epoch),
        "next": (random.random(), float(np.random.rand()), torch.rand(()).item()),
    }


def equal(a: Any, b: Any) -> bool:
    """Bitwise."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def compare(
    path: Path,
    hook: str,
    step: int,
    train: Callable[[], Any],
    *,
    plateau: bool = False,
    acts_late: bool = False,
    make: Callable[..., pl.Trainer] = pl.Trainer,
    until: dict[str, Any] | None = None,
    first: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Assert that straight == killed and resumed in what seems a new process with other seeds."""
    options = {**QUIET, "max_epochs": 3, **options}

    def fit(callback: SaveAt, number: int, extra: Any, ckpt_path: Path | None = None) -> pl.Trainer:
        seed(number)
        trainer = make(callbacks=[callback], **{**options, **(extra or {})})
        val = DataLoader(Noisy(8), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(number))  # fmt: skip
        trainer.fit(Model(plateau=plateau, acts_late=acts_late), train(), val, ckpt_path=ckpt_path)
        return trainer

    straight = fit(SaveAt(path), 1, until)
    expected = outcome(straight)
    saver = SaveAt(path, hook, step, dies=hook != "train_end")
    try:
        fit(saver, 1, first)
    except DeadError:
        assert hook != "train_end"
    assert saver.saved_from >= 0, "nothing was saved"
    torch.load(path, weights_only=True)
    resumed = fit(SaveAt(path), 2, until, path)
    result = outcome(resumed)

    assert resumed.lightning_module.seen == straight.lightning_module.seen[saver.saved_from :]
    for part, value in expected.items():
        assert equal(value, result[part]), part
