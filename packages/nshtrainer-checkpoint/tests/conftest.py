from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class Model(pl.LightningModule):
    """A linear layer whose validation metric follows a script, one value for each validation.

    Args:
        values: What `val/loss` is; None logs the real loss.
        name: The metric's name.
        scheduler: Whether the learning rate halves at each epoch.
        hparams: Saved as hyper-parameters.
    """

    def __init__(
        self,
        values: list[float] | None = None,
        name: str = "val/loss",
        *,
        scheduler: bool = False,
        hparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.values = None if values is None else iter(values)
        self.metric, self.scheduler = name, scheduler
        if hparams:
            self.save_hyperparameters(hparams, logger=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.layer(batch[0]) - 1).pow(2).mean()
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.values is None:
            self.log(self.metric, (self.layer(batch[0]) - 1).pow(2).mean())

    def on_validation_epoch_end(self) -> None:
        if self.values is not None:
            self.log(self.metric, next(self.values))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.layer(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        if not self.scheduler:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.fixture
def model() -> type[Model]:
    return Model


@pytest.fixture
def loader() -> Callable[[], DataLoader[Any]]:
    """Four batches, the same in the same order each time."""
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    return lambda: DataLoader(TensorDataset(data), batch_size=4)


@pytest.fixture
def fit(tmp_path: Path, loader: Callable[[], DataLoader[Any]]) -> Callable[..., pl.Trainer]:
    """Train *model* with our Trainer in `tmp_path`, run `r` unless said otherwise."""

    def fit(
        module: pl.LightningModule,
        *,
        ckpt_path: str | Path | None = None,
        validate: bool = True,
        objects: dict[str, Any] | None = None,
        **fields: Any,
    ) -> pl.Trainer:
        values = {
            "id": "r",
            "max_epochs": 2,
            "loggers": [],
            "directory": {"project_root": tmp_path},
            **QUIET,
            **fields,
        }
        trainer = Trainer(TrainerConfig.model_validate(values), **(objects or {}))
        trainer.fit(module, loader(), loader() if validate else None, ckpt_path=ckpt_path)
        return trainer

    return fit


@pytest.fixture
def plain_fit(tmp_path: Path, loader: Callable[[], DataLoader[Any]]) -> Callable[..., pl.Trainer]:
    """Train with a plain Lightning trainer whose root is `tmp_path`."""

    def fit(
        module: pl.LightningModule,
        callbacks: list[pl.Callback],
        *,
        ckpt_path: str | Path | None = None,
        **kwargs: Any,
    ) -> pl.Trainer:
        options: dict[str, Any] = {"max_epochs": 2, "logger": False, **QUIET, **kwargs}
        trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks, **options)
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer

    return fit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where run `r` keeps its checkpoints."""
    return tmp_path / "nshtrainer_logs" / "r" / "checkpoint"


@pytest.fixture
def names() -> Callable[[Path], list[str]]:
    """The stems of the committed checkpoints in a folder."""

    def names(folder: Path) -> list[str]:
        sidecars = folder.glob("*.ckpt.metadata.json")
        return sorted(s.name.removesuffix(".ckpt.metadata.json") for s in sidecars)

    return names
