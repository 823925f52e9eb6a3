"""All callbacks at once on two gloo processes."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = """
import json, logging, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from nshtrainer import create_callbacks

out, mode = Path(sys.argv[1]), sys.argv[2]

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.norms = []
    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        if mode == "nan" and self.global_step == 2 and self.global_rank == 1:
            loss = loss * float("nan")
        return loss
    def on_before_optimizer_step(self, optimizer):
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())
    def validation_step(self, batch, batch_idx):
        if mode != "one" or self.global_rank == 0:
            synced = mode not in ("unsynced", "one")
            self.log("val/loss", self.layer(batch).mean(), sync_dist=synced)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def train_dataloader(self):
        return DataLoader(torch.sin(torch.arange(48.0)).reshape(16, 3), batch_size=2)
    val_dataloader = train_dataloader

names = ["debug_flag", "epoch_timer", {"name": "finite_checks", "nonfinite_grads": "raise"},
    "learning_rate_monitor", "log_epoch",
    {"name": "metric_validation", "metrics": ["val_loss" if mode == "typo" else "val/loss"],
        "check_ranks_agree": mode in ("fine", "unsynced"), "check_finite": True},
    {"name": "norm_logging", "log_grad_norm": True, "log_param_norm": True},
    {"name": "print_table_metrics", "metric_patterns": ["val/loss"]}]
trainer = Trainer(callbacks=create_callbacks(names), accelerator="cpu", devices=2, strategy="ddp",
    logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2,
    enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=1,
    default_root_dir=out)
module, error = Net(), ""
try:
    trainer.fit(module)
except Exception as e:
    error = f"{type(e).__name__}: {e}"
result = {"error": error, "step": trainer.global_step, "norms": module.norms,
    "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
    "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
if error:
    sys.stdout.flush()
    import os
    os._exit(0)  # the launcher of rank zero would kill rank one before it has written
"""


def test_ranks_agree_and_only_rank_zero_prints(run_on_two_ranks, tmp_path):
    """Metrics are equal on both ranks (the slowest one's time too); the table is printed once."""
    (zero, one), outputs = run_on_two_ranks(SCRIPT, tmp_path, "fine")

    assert zero["error"] == one["error"] == ""
    assert zero["metrics"] == one["metrics"]
    metrics = zero["metrics"]
    assert metrics["train/grad_norm"] == pytest.approx(zero["norms"][-1], rel=1e-5)
    assert metrics["computed_epoch"] == 2.0
    assert metrics["train/epoch_time_s"] > 0
    assert ["val/loss" in output for output in outputs] == [True, False]


def test_every_rank_stops_before_the_bad_step(run_on_two_ranks, tmp_path):
    """A NaN on one rank is in the gradients of both, and both stop with sound weights."""
    results, outputs = run_on_two_ranks(SCRIPT, tmp_path, "nan")

    for result in results:
        assert result["error"].startswith("NonFiniteGradientError"), outputs
        assert result["step"] == 2
        assert result["finite"]


def test_every_rank_reports_a_missing_metric(run_on_two_ranks, tmp_path):
    """No rank goes on alone when a required metric is missing."""
    results, outputs = run_on_two_ranks(SCRIPT, tmp_path, "typo")

    assert all(r["error"].startswith("ConfigError: after the sanity") for r in results), outputs


def test_every_rank_reports_what_one_of_them_lacks(run_on_two_ranks, tmp_path):
    """A metric that one rank does not log stops all of them, with the name of the rank."""
    results, outputs = run_on_two_ranks(SCRIPT, tmp_path, "one")

    for result in results:
        assert "missing on rank 1" in result["error"], outputs
        assert result["step"] == 0


def test_values_that_differ_between_ranks_are_found(run_on_two_ranks, tmp_path):
    """A metric without sync_dist, the cause of ranks that disagree on what is best, is named."""
    results, outputs = run_on_two_ranks(SCRIPT, tmp_path, "unsynced")

    for result in results:
        assert "'val/loss' differs between ranks (rank 0: " in result["error"], outputs
        assert "sync_dist=True" in result["error"]
        assert result["step"] == 0
