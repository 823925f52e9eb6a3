"""The demo's data and model."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from nshtrainer.errors import ConfigError

__all__ = ["DigitsData", "DigitsModel"]


class DigitsData(pl.LightningDataModule):
    """1,797 images of 8 x 8 pixels in ten classes; every fifth one is for validation.

    Args:
        batch_size: Images in a training batch.

    Raises:
        ConfigError: scikit-learn, which ships the images, is not installed.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        if importlib.util.find_spec("sklearn") is None:
            raise ConfigError(
                "the demo's images come with scikit-learn, which is not installed; "
                "run `pip install 'nshtrainer-core[demo]'`"
            )
        self.batch_size = batch_size

    @override
    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs] -- scikit-learn ships none

        digits = cast("Any", load_digits())
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
        labels = torch.tensor(digits.target, dtype=torch.int64)
        held_out = torch.arange(len(labels)) % 5 == 0
        self.train_set = TensorDataset(images[~held_out], labels[~held_out])
        self.val_set = TensorDataset(images[held_out], labels[held_out])

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val_set, 120)


class DigitsModel(pl.LightningModule):
    """Two convolutions and a linear layer; logs `train_loss`, `val_loss` and `val_acc`.

    Args:
        width: Channels of the first convolution.
        learning_rate: Peak of the schedule; see `learning_rate_factor`.
    """

    num_batches: int
    """How many batches this process has trained on."""

    def __init__(self, width: int = 24, learning_rate: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.num_batches = 0
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10),
        )  # fmt: skip

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape `(batch, 10)`, of *images*, shape `(batch, 1, 8, 8)`."""
        return self.net(images)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.num_batches += 1
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        accuracy = (scores.argmax(1) == labels).float().mean()
        self.log("val_loss", functional.cross_entropy(scores, labels), prog_bar=True)
        self.log("val_acc", accuracy, prog_bar=True)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(step: int) -> float:
    """Part of the peak learning rate at *step*: it rises for 100 steps, then halves every 100.

    It does not depend on how long the training is, so a resumed one can go on for longer.
    """
    return min((step + 1) / 100, 0.5 ** ((step - 100) / 100))
