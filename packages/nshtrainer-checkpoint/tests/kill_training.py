"""Trains one run again and again, each time killed at another file event of a save.

Run as a script with a folder; prints what was found after each kill, as JSON lines. Torch is
imported once and each training is a fork.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig
from nshtrainer_checkpoint.metadata import SidecarReader, is_intact

EVENTS = ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir", "shutil.move")


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def train(root: Path, epochs: int) -> None:
    config = TrainerConfig(
        id="r",
        max_epochs=epochs,
        loggers=[],
        primary_metric={"name": "val/loss", "mode": "min"},
        directory={"project_root": root},
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.ones(2, 64)), batch_size=1)
    Trainer(config).fit(Model(), data, data, ckpt_path="last")


def kill_at(event: int, folder: Path) -> None:
    """Let this process die at its *event*-th file event below *folder*, counted from now."""
    seen = 0

    def hook(name: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if name in EVENTS and str(folder) in repr(args):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def look(folder: Path) -> dict[str, object]:
    """What a reader finds by the documented names."""
    found: dict[str, object] = {}
    for link in ("last.ckpt", "best_val_loss.ckpt"):
        path = folder / link
        whole = path.exists() and torch.load(path, weights_only=True)["global_step"]
        found[link] = whole
    records = SidecarReader().records(folder / "last")
    found["newest"] = max((r.step for r in records), default=0)
    found["intact"] = all(is_intact(r) for r in records)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    root = Path(sys.argv[1])
    folder = root / "nshtrainer_logs" / "r" / "checkpoint"
    train(root, 1)
    for event in (*range(1, 100, 7), None):
        child = os.fork()
        if child == 0:
            if event is not None:
                kill_at(event, folder)
            train(root, 200 if event is not None else look(folder)["newest"] // 2 + 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status), **look(folder)}), flush=True)  # noqa: T201 -- read by the test


if __name__ == "__main__":
    main()
