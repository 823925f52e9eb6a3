"""An optimizer step as the gradient pipeline sees it, with the gradients that it had."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientRequest, GradientStep
from nshtrainer.testing import TinyLoader, quiet_trainer_kwargs

from .ema_weights import Weights

__all__ = ["step_of"]


class _Shrinking(Weights):
    """Weights that are pulled to zero: the gradient of each is the weight itself."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([weight.square().sum() / 2 for weight in self.parameters()]).sum()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Look(Callback):
    """Keeps the steps."""

    def __init__(self) -> None:
        self.seen: list[GradientStep] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach(trainer, "benchmark").gradients.register(
            "benchmark",
            request=lambda _: GradientRequest(totals=(2.0,)),
            observe=self.seen.append,
        )


def step_of(shapes: list[tuple[int, ...]]) -> GradientStep:
    """Train fp32 weights of these *shapes* for one batch, and return its step."""
    look = _Look()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(**quiet_trainer_kwargs(folder), callbacks=[look])
        trainer.fit(_Shrinking(shapes, torch.float32), TinyLoader(batches=1))
    (step,) = look.seen
    return step
