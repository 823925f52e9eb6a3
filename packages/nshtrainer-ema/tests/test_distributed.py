"""Two gloo processes under DDP: all ranks decide the same and hold the same average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import math, sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset
from nshtrainer import MetricConfig
from nshtrainer_ema import EarlyStoppingCallback, EMACallback, GradientSkippingCallback

folder, ckpt = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else None)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        seed_everything(3, verbose=False)
        self.layer = torch.nn.Linear(4, 1)
        self.seen, self.frozen, self.trained = [], [], []

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        # The batch of rank 1 alone explodes.
        exploded = self.global_rank == 1 and self.global_step in (2, 5)
        return loss * (1e6 if exploded else 1.0)

    def on_before_zero_grad(self, optimizer):
        self.before = self.layer.weight.detach().clone()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.frozen.append(torch.equal(self.before, self.layer.weight))
        self.trained.append(self.layer.weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())

    def on_validation_epoch_end(self):
        # Only rank 0 ever sees its metric getting worse; rank 1 logs none at all.
        if self.global_rank == 0:
            self.log("val/own", float(self.current_epoch), rank_zero_only=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def loader():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


# Eight samples a step, four of each rank: a decay of 0.8.
ema = EMACallback(half_life_samples=8 * math.log(0.5) / math.log(0.8))
skipping = GradientSkippingCallback(threshold=1000.0, start_after_n_steps=0)
stopper = EarlyStoppingCallback(metric=MetricConfig(name="val/own", mode="min"), patience=2)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=9, callbacks=[ema, skipping, stopper],
    logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
)
model = Model()
start = model.layer.weight.detach().clone()
trainer.fit(model, loader(), loader())
trainer.save_checkpoint(folder + "/end.ckpt")
torch.save(
    {
        "start": start, "trained": model.trained, "weight": model.layer.weight.detach(), "average": ema.average, "seen": model.seen,
        "frozen": model.frozen, "skipped": skipping.state_dict(), "epochs": trainer.current_epoch,
        "message": stopper.stopping_reason_message,
    },
    f"{folder}/rank{trainer.global_rank}.pt",
)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_on_two_ranks: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    run_on_two_ranks(SCRIPT, folder)
    return [load(folder / f"rank{rank}.pt") for rank in (0, 1)] + [load(folder / "end.ckpt")]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_step_is_skipped_on_all_ranks_or_on_none(ranks):
    """Only one rank's batch explodes."""
    first, second, _ = ranks

    assert [i for i, frozen in enumerate(first["frozen"]) if frozen] == [2, 5]
    assert first["frozen"] == second["frozen"]
    assert first["skipped"] == second["skipped"]
    assert first["skipped"]["skipped_steps"] == 2


def test_all_ranks_hold_the_same_average_and_evaluate_with_it(ranks):
    """Bitwise, with no communication; the file has it too."""
    first, second, file = ranks

    assert torch.equal(first["weight"], second["weight"])
    for name, average in first["average"].items():
        assert torch.equal(average, second["average"][name])
        assert torch.equal(average, file["state_dict"][name])
    assert all(torch.equal(a, b) for a, b in zip(first["seen"], second["seen"], strict=True))
    assert torch.equal(first["seen"][-1], first["average"]["layer.weight"])
    assert torch.equal(file["nshtrainer_average"]["weights"]["layer.weight"], first["weight"])


def test_a_half_life_in_samples_counts_those_of_all_ranks(ranks):
    """Of the steps that were not skipped."""
    first, _, _ = ranks
    average = first["start"].double()
    for weight, skipped in zip(first["trained"], first["frozen"], strict=True):
        if not skipped:
            average = 0.8 * average + 0.2 * weight.double()

    torch.testing.assert_close(
        first["average"]["layer.weight"].double(), average, rtol=1e-5, atol=1e-6
    )


def test_one_rank_that_wants_to_stop_stops_all(ranks):
    """The others neither hang nor fail for want of a metric that only rank 0 logs."""
    first, second, _ = ranks

    assert first["epochs"] == second["epochs"] == 3
    assert "did not improve" in first["message"]
    assert second["message"] == "Another rank signals to stop."
