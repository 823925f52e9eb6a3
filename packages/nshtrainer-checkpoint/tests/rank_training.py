"""Trains on two gloo ranks, one of which fails or is killed; a script: folder, what, where, which rank."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch[0]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Accident(Callback):
    """At step 6, after the first epoch and its checkpoint, or from then on in a validation or a save."""

    def __init__(self, what: str, where: str, rank: int) -> None:
        self.what, self.where, self.rank = what, where, rank

    def happen(self, where: str, trainer: pl.Trainer) -> None:
        if where != self.where or trainer.global_rank != self.rank or trainer.global_step < 6:
            return
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the user's error")

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.happen("train", trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.happen("validation", trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self.happen("save", trainer)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    root, what, where, rank = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    (root / f"{what}{os.environ.get('LOCAL_RANK', '0')}.pid").write_text(str(os.getpid()))
    config = TrainerConfig(
        id="r",
        max_epochs=3,
        loggers=[],
        primary_metric={"name": "val/loss", "mode": "min"},
        directory={"project_root": root},
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=1)
    trainer = Trainer(config, callbacks=[Accident(what, where, rank)])
    trainer.fit(Model(), data, data, ckpt_path="auto")
    if trainer.is_global_zero:
        (root / "finished").write_text(str(trainer.global_step))


if __name__ == "__main__":
    main()
