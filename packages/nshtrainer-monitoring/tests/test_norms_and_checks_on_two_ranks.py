"""Norms of sharded weights, and findings of one rank, on two gloo processes."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from nshtrainer_monitoring import FiniteChecksCallback, NormLoggingCallback, NormLoggingCallbackConfig

out, mode = Path(sys.argv[1]), sys.argv[2]
options = {n: True for n in NormLoggingCallbackConfig.model_fields if n.startswith("log_")}


def norm(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).norm().item()


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)
        self.truth = {}
        self.steps = 0

    def configure_model(self):
        if mode == "sharded":
            for module in (self.first, self.second, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.steps += 1
        loss = self.second(self.first(batch).tanh()).square().mean()
        if mode != "sharded" and batch_idx == 2 and self.global_rank == 1:
            loss = loss * float("nan")
        return loss

    def on_before_optimizer_step(self, optimizer):
        if mode != "sharded":
            return  # a step that is skipped has no gradients
        self.before = [whole(p) for p in self.parameters()]
        self.truth["train/grad_norm"] = norm(whole(p.grad) for p in self.parameters())
        self.truth["train/param_norm"] = norm(self.before)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if mode != "sharded":
            return
        after = [whole(p) for p in self.parameters()]
        update = norm(a.double() - b.double() for a, b in zip(after, self.before))
        self.truth["train/update_norm"] = update
        self.truth["train/update_ratio"] = update / self.truth["train/param_norm"]
        (optimizer,) = self.trainer.optimizers
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = [whole(s[kind]) for s in optimizer.state.values()]
            self.truth[f"train/{kind}_norm"] = norm(moments)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.sin(torch.arange(48.0)).reshape(16, 3), batch_size=2)


strategy = "ddp"
if mode == "sharded":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [NormLoggingCallback(**options)]
else:
    # Each rank has other losses: what one finds counts for both.
    callbacks = [FiniteChecksCallback(
        nonfinite_loss=mode, nonfinite_grads="ignore", find_module=True, dump=True, dump_dir=out,
    )]
trainer = Trainer(callbacks=callbacks, accelerator="cpu", devices=2, strategy=strategy,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2,
    enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0,
    default_root_dir=out)
module, error = Net(), ""
try:
    trainer.fit(module)
except Exception as e:
    error = f"{type(e).__name__}: {e}"
result = {"error": error, "steps": module.steps, "truth": module.truth,
    "finite": all(bool(whole(p).isfinite().all()) for p in module.parameters()),
    "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
if error:
    sys.stdout.flush()
    os._exit(0)  # the launcher of rank zero would kill rank one before it has written
"""


def test_norms_of_sharded_weights_are_those_of_the_whole(run_on_two_ranks, tmp_path):
    """With FSDP2 each rank logs what one process would measure of the whole tensors."""
    for result in run_on_two_ranks(SCRIPT, tmp_path, "sharded")[0]:
        assert result["error"] == ""
        assert len(result["truth"]) == 6
        for name, expected in result["truth"].items():
            assert result["metrics"][name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize(("action", "steps"), [("raise", 3), ("stop", 3), ("skip", 8)])
def test_a_finding_of_one_rank_counts_for_both(run_on_two_ranks, tmp_path, action, steps):
    """Both ranks end, or go on, alike and with sound weights; none waits for the other."""
    zero, one = run_on_two_ranks(SCRIPT, tmp_path, action)[0]

    assert zero["steps"] == one["steps"] == steps
    for rank, result in enumerate((zero, one)):
        assert result["finite"]
        assert result["error"].partition(":")[0] == (
            "NonFiniteLossError" if action == "raise" else ""
        )
        assert (tmp_path / f"step0000000002-rank{rank}.pt").exists()
    if action == "raise":
        assert "on another rank" in zero["error"]
        assert "the loss is not, in batch 2" in one["error"]
