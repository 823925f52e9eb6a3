"""Train a small classifier of handwritten digits, described by one configuration.

Run it with `python examples/digits.py`; it takes well under a minute on two cores. What it writes is
below `nshtrainer_logs` in the current folder.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import MetricConfig, Trainer, TrainerConfig
from nshtrainer.configs import (
    EarlyStoppingCallbackConfig,
    EMACallbackConfig,
    GradientSkippingCallbackConfig,
    NormLoggingCallbackConfig,
    PrintTableMetricsCallbackConfig,
)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10)
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_acc", (self.layers(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    val = torch.arange(len(labels)) % 5 == 0
    train = TensorDataset(images[~val], labels[~val])
    return (
        DataLoader(train, batch_size=32, shuffle=True),
        DataLoader(TensorDataset(images[val], labels[val]), batch_size=360),
    )


config = TrainerConfig(
    name=["digits-example"],
    seed=0,
    primary_metric=MetricConfig(name="val_acc", mode="max"),
    max_epochs=25,
    accelerator="cpu",
    # The best and the last checkpoint are kept by default; a best one needs a primary metric.
    early_stopping=EarlyStoppingCallbackConfig(patience=8),
    log_norms=NormLoggingCallbackConfig(log_grad_norm=True, log_param_norm=True),
    callbacks=[
        EMACallbackConfig(decay=0.98),
        GradientSkippingCallbackConfig(threshold=20.0),
        PrintTableMetricsCallbackConfig(metric_patterns=["train_loss", "val_acc"]),
    ],
)

if __name__ == "__main__":
    trainer = Trainer(config)
    trainer.fit(Classifier(), *loaders())
    best = trainer.checkpoint_callback
    print(f"best validation accuracy: {best.best_model_score:.2%}")
    print(f"its checkpoint: {best.best_model_path}")
