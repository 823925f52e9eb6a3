"""Trains until a signal comes; run as a script with a folder and the number of ranks."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer_checkpoint import LastCheckpointCallback


class Model(pl.LightningModule):
    """Says at its third step that it is at work, by a file for each rank."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.layer = root, torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            (self.root / f"rank{self.global_rank}.pid").write_text(str(os.getpid()))
        if batch_idx > 3:
            time.sleep(0.02)
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def main() -> None:
    warnings.simplefilter("ignore")
    root, ranks, options = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    data = DataLoader(TensorDataset(torch.ones(4000, 4)), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=400,
        accelerator="cpu",
        strategy="ddp" if ranks > 1 else "auto",
        devices=ranks,
        logger=False,
        default_root_dir=root,
        callbacks=[LastCheckpointCallback(async_save="async" in options)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(root), data)
    (root / f"rank{trainer.global_rank}.finished").touch()


if __name__ == "__main__":
    main()
