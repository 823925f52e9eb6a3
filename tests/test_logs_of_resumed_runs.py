"""The CSV log of a run that was interrupted is that of one that was not: a row for each step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig


class Net(pl.LightningModule):
    """Logs in training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/batch", float(batch_idx))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/one", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Failing(pl.Callback):
    """Ends the run at the start of a batch; notes the steps in the file at its own first batch."""

    def __init__(self, at: int | None, file: Path) -> None:
        self.at, self.file = at, file
        self.batches = 0
        self.found: list[str] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.found is None:
            self.found = [row["step"] for row in rows(self.file)]
        self.batches += 1
        if self.batches == self.at:
            raise RuntimeError("interrupted")


def rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


MOMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "after a step": ({"every_n_steps": 2}, {}),
    "after an epoch": ({"every_n_epochs": 1}, {}),
    "after a validation": ({"on_validation_end": True}, {"val_check_interval": 3}),
    "before a validation": (
        {"before_validation": True, "on_validation_end": False},
        {"val_check_interval": 3},
    ),
}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_each_step_has_its_row(moment, accumulate, tmp_path):
    """Wherever the checkpoint was saved that the run goes on from."""
    policy, options = MOMENTS[moment]
    data = DataLoader(TensorDataset(torch.randn(12, 2)), batch_size=2)

    def fit(folder: Path, fails_at: int | None = None, ckpt_path: str | None = None) -> Failing:
        config = TrainerConfig.model_validate(
            {
                "id": "run",
                "directory": {"project_root": folder},
                "max_epochs": 3,
                "accelerator": "cpu",
                "devices": 1,
                "log_every_n_steps": 1,
                "accumulate_grad_batches": accumulate,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "checkpoint_saving": {
                    "checkpoint_callbacks": [{"name": "last_checkpoint", **policy}]
                },
                **options,
            }
        )
        failing = Failing(fails_at, log_of(folder))
        trainer = Trainer(config, callbacks=[failing])
        if fails_at is None:
            trainer.fit(Net(), data, data, ckpt_path=ckpt_path)
        else:
            with pytest.raises(RuntimeError, match="interrupted"):
                trainer.fit(Net(), data, data)
        return failing

    def log_of(folder: Path) -> Path:
        found = list(folder.rglob("metrics.csv"))
        return found[0] if found else folder / "none"

    fit(tmp_path / "whole")
    fit(tmp_path / "other", fails_at=9)
    resumed = fit(tmp_path / "other", ckpt_path="last")

    whole, other = rows(log_of(tmp_path / "whole")), rows(log_of(tmp_path / "other"))
    names = ("step", "train/batch", "val/one")
    assert [[row[name] for name in names] for row in other] == [
        [row[name] for name in names] for row in whole
    ]
    # A kill at this moment loses no row of before.
    known = [row["step"] for row in whole]
    assert resumed.found
    assert resumed.found == known[: len(resumed.found)]
