"""An exception in a validation, while the average stands in for the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.runtime.saving import AVERAGE_KEY
from nshtrainer.testing import TinyDataModule, TinyModule
from nshtrainer_checkpoint.metadata import SidecarReader
from nshtrainer_ema import EMACallback

pytestmark = [
    pytest.mark.slow,
    # Lightning cannot know that ours makes it resumable.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class FailInValidation(Callback):
    """Remembers the weights as trained and those in use, and raises in the second validation."""

    def __init__(self) -> None:
        self.trained: dict[str, torch.Tensor] = {}
        self.evaluated: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        self.trained = copied(pl_module)

    def on_validation_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        if trainer.current_epoch == 1:
            self.evaluated = copied(pl_module)
            raise RuntimeError("the user's error")


def copied(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(
    folder: Path, ema: dict[str, Any], *callbacks: Callback, ckpt_path: str | None = None
) -> tuple[Trainer, TinyModule]:
    config = TrainerConfig(
        id="r",
        directory={"project_root": folder},
        max_epochs=3,
        loggers=[],
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        primary_metric={"name": "val_loss", "mode": "min"},
        callbacks=[{"name": "ema", "decay": 0.9, **ema}],
    )
    torch.manual_seed(0)
    module = TinyModule()
    trainer = Trainer(config, callbacks=list(callbacks))
    trainer.fit(module, datamodule=TinyDataModule(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("original", [False, True], ids=["average", "original"])
def test_both_sets_of_weights_are_saved_and_the_module_has_its_own_back(
    tmp_path: Path, original: bool
):
    """The file says which set is which, and a resumed run is bitwise the uninterrupted one."""
    ema = {"validate_original_weights": original}
    failing = FailInValidation()
    modules: list[LightningModule] = []

    class Keep(Callback):
        def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
            modules.append(pl_module)

    with pytest.raises(RuntimeError, match="the user's error"):
        fit(tmp_path / "dead", ema, failing, Keep())

    assert same(copied(modules[0]), failing.trained)
    assert same(failing.evaluated, failing.trained) is original
    folder = tmp_path / "dead" / "nshtrainer_logs" / "r" / "checkpoint" / "on_exception"
    (saved,) = SidecarReader().records(folder)
    checkpoint = torch.load(saved.path, weights_only=True)
    assert same(checkpoint["state_dict"], failing.evaluated)
    record = checkpoint[AVERAGE_KEY]
    kept = checkpoint["state_dict"] if original else record["weights"]
    assert same(kept, failing.trained)
    assert not same(record["average"] if original else checkpoint["state_dict"], failing.trained)

    straight, expected = fit(tmp_path / "straight", ema)
    resumed, module = fit(tmp_path / "dead", ema, ckpt_path=str(saved.path))
    assert same(copied(module), copied(expected))
    assert same(average_of(resumed), average_of(straight))


def average_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    callbacks: list[Any] = trainer.callbacks
    return next(c for c in callbacks if isinstance(c, EMACallback)).average
