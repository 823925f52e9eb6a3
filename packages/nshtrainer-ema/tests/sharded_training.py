"""Averages sharded weights (FSDP2) on two gloo ranks; a script: folder, name, epochs, kind, start."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer_ema import EMACallback


class Model(pl.LightningModule):
    """Two layers, each split over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 1)
        self.trained: list[torch.Tensor] = []
        self.metrics: list[float] = []

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (self.first, self.second, self):
            fully_shard(module, mesh=mesh)

    def _loss(self, batch):
        return (self.second(self.first(batch[0]).relu()) - 1).pow(2).mean()

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trained.append(self.first.weight.to_local().detach().clone())

    def validation_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.metrics.append(float(loss))
        self.log("val/loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    root, name, epochs, sharded = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    start = sys.argv[5] if len(sys.argv) > 5 else None
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=sharded == "shards",
    )
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(data), batch_size=4)
    ema = EMACallback(decay=0.8, extra_decays=[0.5])
    saver = ModelCheckpoint(root / name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, callbacks=[ema, saver],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=root,
    )  # fmt: skip
    model = Model()
    trainer.fit(model, loader, loader, ckpt_path=start)
    torch.save(
        {
            "trained": model.trained,
            "metrics": model.metrics,
            "weights": {n: p.to_local() for n, p in model.named_parameters()},
            "averages": {
                label: {n: t.to_local() for n, t in ema.ema.of(label).items()}
                for label in ema.ema.labels
            },
        },
        root / f"{name}-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
