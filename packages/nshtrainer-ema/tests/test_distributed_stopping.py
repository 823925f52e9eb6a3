"""Two gloo processes: all ranks stop together, by one clock, and hold the same restored weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import MetricConfig
from nshtrainer_ema import EarlyStoppingCallback
from nshtrainer_ema.early_stopping.patience import TrainingClock

folder, scenario = Path(sys.argv[1]), sys.argv[2]
sharded = scenario.startswith("sharded")
METRIC = MetricConfig(name="val/metric", mode="min")
VALUES = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        seed_everything(3, verbose=False)
        self.layer = torch.nn.Linear(4, 2)
        self.after = []

    def configure_model(self):
        if sharded:
            for module in (self.layer, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def local(self):
        weight = self.layer.weight.detach()
        return (weight.to_local() if sharded else weight).clone()

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        value = VALUES[self.current_epoch]
        if scenario == "nan" and self.global_rank == 1 and self.current_epoch == 2:
            value = float("nan")
        self.log("val/metric", value)

    def on_train_epoch_end(self):
        self.after.append(self.local())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Unreadable(Callback):
    def on_train_end(self, trainer, pl_module):
        if trainer.global_rank == 1:
            def load_checkpoint(*args, **kwargs):
                raise OSError("no such node")
            trainer.strategy.load_checkpoint = load_checkpoint


class Loses(Callback):
    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            for file in Path(trainer.checkpoint_callback.best_model_path).glob("*_1_*.distcp"):
                file.unlink()
        trainer.strategy.barrier()


options = {
    "time": {"patience": 2, "patience_unit": "hours"},
    "nan": {"patience": 9},
}.get(scenario, {"patience": 2, "restore_best_weights": True})
stopper = EarlyStoppingCallback(metric=METRIC, **options)
callbacks = [stopper, ModelCheckpoint(folder / scenario, "{epoch}", monitor="val/metric")]
if scenario == "unreadable":
    callbacks.append(Unreadable())
if scenario == "sharded and damaged":
    callbacks.append(Loses())
x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
model = Model()
trainer = Trainer(
    accelerator="cpu", devices=2,
    strategy=ModelParallelStrategy(2, 1) if sharded else "ddp",
    max_epochs=6, callbacks=callbacks, logger=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
)
# Two batches an epoch on each rank: an hour by the clock of rank 0, no time by that of rank 1.
stopper._clock = TrainingClock(lambda: trainer.global_step * 1800.0 * (trainer.global_rank == 0))
trainer.fit(model, loader, loader)
weight = model.local()
torch.save(
    {
        "weight": weight, "after": model.after, "epochs": trainer.current_epoch,
        "message": stopper.stopping_reason_message, "reason": stopper.stopping_reason.name,
        "restored": stopper.restored_path, "stopped_epoch": stopper.stopped_epoch,
    },
    folder / f"{scenario}{trainer.global_rank}.pt",
)
"""


@pytest.fixture
def train(tmp_path: Path, run_on_two_ranks: Any) -> Any:
    def run(scenario: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        shown = run_on_two_ranks(SCRIPT, tmp_path, scenario)
        ranks = [
            torch.load(tmp_path / f"{scenario}{rank}.pt", weights_only=True) for rank in (0, 1)
        ]
        return ranks[0], ranks[1], shown

    return run


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_the_clock_of_rank_zero_decides_for_all(train):
    """However far the others' clocks are off."""
    first, second, _ = train("time")

    assert first["epochs"] == second["epochs"] == 4
    assert first["message"] == second["message"]
    assert "in the last 2 hours" in first["message"]


def test_why_another_rank_has_stopped_is_known_where_it_is_stored(train):
    """Rank 0 shows and stores the words of rank 1; all know the reason."""
    first, second, shown = train("nan")

    assert first["epochs"] == second["epochs"] == 3
    assert first["stopped_epoch"] == second["stopped_epoch"] == 2
    assert first["reason"] == second["reason"] == "NON_FINITE_METRIC"
    assert first["message"] == f"Rank 1 signals to stop: {second['message']}"
    assert "val/metric is nan" in second["message"]
    assert first["message"] in shown


def test_all_ranks_get_the_best_weights(train):
    """Bitwise the same ones."""
    first, second, shown = train("restore")

    assert first["epochs"] == second["epochs"] == 4
    assert torch.equal(first["weight"], first["after"][1])
    assert torch.equal(first["weight"], second["weight"])
    assert first["restored"] == second["restored"]
    assert shown.count("the module has the weights of the best checkpoint") == 1


def test_where_one_rank_cannot_read_none_changes_its_weights(train):
    """Else the ranks would go on with different ones."""
    first, second, shown = train("unreadable")

    assert torch.equal(first["weight"], first["after"][3])
    assert torch.equal(first["weight"], second["weight"])
    assert first["restored"] is second["restored"] is None
    assert "another rank could not load it" in shown


def test_sharded_weights_are_restored_shard_by_shard(train):
    """FSDP2: each rank has its part of the best ones."""
    for rank in train("sharded")[:2]:
        assert torch.equal(rank["weight"], rank["after"][1])
        assert not torch.equal(rank["weight"], rank["after"][3])
        assert rank["restored"].endswith("epoch=1.ckpt")


def test_a_sharded_checkpoint_that_lacks_a_part_changes_nothing(train):
    """What was loaded before that is taken back on every rank."""
    first, second, shown = train("sharded and damaged")

    for rank in (first, second):
        assert torch.equal(rank["weight"], rank["after"][3])
        assert rank["restored"] is None
    assert "a part of it cannot be read on rank 1" in shown
