"""A module and data small enough to train in milliseconds, the same on every machine and run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["TinyDataModule", "TinyLoader", "TinyModule", "quiet_trainer_kwargs"]

FEATURES = 4
"""Width of the inputs."""


def quiet_trainer_kwargs(folder: Path | str, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments for `lightning.pytorch.Trainer`: one CPU process that prints and saves nothing.

    Args:
        folder: Where anything that is written all the same goes (`tmp_path`).
        overrides: Arguments to add or replace.
    """
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        **overrides,
    }


class TinyLoader:
    """Batches of a linear problem, the same in every pass; no `DataLoader`, so no worker warnings.

    Args:
        batches: How many there are.
        batch_size: Samples in each.
        seed: Which problem; global random generators are neither read nor moved.

    Yields `(x, y)`, shapes `(batch_size, 4)` and `(batch_size, 1)`, float32, on the CPU.
    """

    def __init__(self, batches: int = 4, batch_size: int = 4, seed: int = 0) -> None:
        self.batches, self.batch_size, self.seed = batches, batch_size, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.linspace(-1, 1, FEATURES)[:, None]
        for _ in range(self.batches):
            x = torch.randn(self.batch_size, FEATURES, generator=generator)
            yield x, x @ weights


class TinyDataModule(LightningDataModule):
    """Loaders for every stage.

    Args:
        batches: Training batches an epoch; the other stages have two each.
        batch_size: Samples in each batch.
        seed: Which problem.
    """

    def __init__(self, batches: int = 4, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.batches, self.batch_size, self.seed = batches, batch_size, seed

    @override
    def train_dataloader(self) -> TinyLoader:
        return TinyLoader(self.batches, self.batch_size, self.seed)

    @override
    def val_dataloader(self) -> TinyLoader:
        return TinyLoader(2, self.batch_size, self.seed + 1)

    @override
    def test_dataloader(self) -> TinyLoader:
        return TinyLoader(2, self.batch_size, self.seed + 2)

    @override
    def predict_dataloader(self) -> TinyLoader:
        return TinyLoader(2, self.batch_size, self.seed + 3)


class TinyModule(LightningModule):
    """Two linear layers; logs `train_loss`, `val_loss` and `test_loss`.

    Args:
        optimizer: Which optimizer to make.
        optimizers: How many, each for a part of the layers (at most two); more than one means
            manual optimization, since Lightning has no other way.
        manual: Whether optimization is manual.
        batch_norm: Whether there is a BatchNorm between the layers.
        fused: Whether the optimizer is a fused one, which can skip a step without asking the host.
        lr: Learning rate.
        seed: Where the weights start; global random generators are neither read nor moved.
    """

    def __init__(
        self,
        *,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        optimizers: Literal[1, 2] = 1,
        manual: bool = False,
        batch_norm: bool = False,
        fused: bool = False,
        lr: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            self.body = nn.Linear(FEATURES, 8)
            self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
            self.head = nn.Linear(8, 1)
        finally:
            torch.set_rng_state(state)
        self.optimizer, self.num_optimizers = optimizer, optimizers
        self.lr, self.fused = lr, fused
        self.automatic_optimization = not (manual or optimizers > 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction for *x*, shape `(batch, 1)`."""
        return self.head(torch.relu(self.norm(self.body(x))))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error on *batch*, shape `()`."""
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), batch_size=len(batch[0]))
        if not self.automatic_optimization:
            optimizers: Any = self.optimizers()
            for index, optimizer in enumerate(
                optimizers if isinstance(optimizers, list) else [optimizers]  # pyright: ignore[reportUnknownArgumentType] -- Lightning returns one or a list
            ):
                optimizer.zero_grad()
                self.manual_backward(loss if index == 0 else self.loss(batch))
                optimizer.step()
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]))

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    @override
    def configure_optimizers(self) -> Any:
        if self.num_optimizers == 1:
            return self._optimizer(list(self.parameters()))
        return [
            self._optimizer(list(self.body.parameters())),
            self._optimizer([*self.norm.parameters(), *self.head.parameters()]),
        ]

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        make: Any = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.SGD
        return make(parameters, lr=self.lr, fused=self.fused or None)
