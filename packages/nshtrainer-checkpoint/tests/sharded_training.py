"""Trains sharded weights (FSDP2) on two gloo ranks; run as a script: folder, id, epochs, start."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig


class Model(pl.LightningModule):
    """Two layers, each split over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 1)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (self.first, self.second, self):
            fully_shard(module, mesh=mesh)

    def _loss(self, batch):
        return (self.second(self.first(batch[0]).relu()) - 1).pow(2).mean()

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    root, run_id, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = TrainerConfig.model_validate(
        {
            "id": run_id, "max_epochs": epochs, "loggers": [], "log_norms": None, "early_stopping": None,
            "primary_metric": {"name": "val/loss", "mode": "min"},
            "directory": {"project_root": root},
            "checkpoint_saving": {"trial": True, "async_save": len(sys.argv) > 5},
            "accelerator": "cpu", "devices": 2, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False,
        }
    )  # fmt: skip
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(data), batch_size=4)
    trainer = Trainer(config, strategy=strategy)
    model = Model()
    trainer.fit(model, loader, loader, ckpt_path=sys.argv[4])
    torch.save(
        {
            "step": trainer.global_step,
            "source": str(trainer.ckpt_path),
            "weights": {n: p.to_local() for n, p in model.state_dict().items()},
            "moments": [
                {k: getattr(v, "_local_tensor", v) for k, v in s.items()}
                for s in trainer.optimizers[0].state.values()
            ],
        },
        root / f"{run_id}-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
