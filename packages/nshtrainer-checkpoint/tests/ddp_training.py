"""Trains on two gloo ranks; run as a script with a folder and what is to happen."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig


class Model(pl.LightningModule):
    """Its metric gets better on rank 0 and worse on rank 1, or is logged on rank 0 only."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.case = torch.nn.Linear(4, 1), case

    def training_step(self, batch, batch_idx):
        if self.case == "exception" and self.global_step == 3:
            raise RuntimeError("the user's error")
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        better = -float(self.current_epoch)
        if self.case != "one_rank":
            self.log("val/loss", better if self.global_rank == 0 else -better)
        elif self.global_rank == 0:
            self.log("val/loss", better, rank_zero_only=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    root, case, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = TrainerConfig(
        id=sys.argv[4] if len(sys.argv) > 4 else None,
        max_epochs=epochs,
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
    trainer = Trainer(config)
    trainer.fit(Model(case), data, data, ckpt_path="last")
    (root / f"rank{trainer.global_rank}").write_text(
        f"{trainer.global_step} {trainer.checkpoint_callback.best_model_path}"
    )


if __name__ == "__main__":
    main()
