"""Two gloo processes: with a policy, all ranks learn, decide and scale alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import sys, warnings
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from nshtrainer_ema import GradientSkippingCallback

warnings.simplefilter("ignore")
folder, kind, action, fused = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "fused"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        seed_everything(3, verbose=False)
        self.first, self.second = torch.nn.Linear(8, 6), torch.nn.Linear(6, 1)
        if kind == "unsynced":
            self.alone = torch.nn.Parameter(torch.zeros(3))
        self.weights = []

    def configure_model(self):
        if kind == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for module in (self.first, self.second, self):
                fully_shard(module, mesh=mesh)

    def training_step(self, batch, batch_idx):
        loss = (self.second(self.first(batch[0]).tanh()) - batch[1]).square().mean()
        # The batch of rank 1 alone explodes.
        exploded = self.global_rank == 1 and self.global_step in (20, 21, 26)
        unused = 0.0 * self.alone.sum() if kind == "unsynced" else 0.0
        return loss * (1e5 if exploded else 1.0) + unused

    def on_after_backward(self):
        if kind == "unsynced":
            # A gradient that no strategy reduces: the ranks measure different norms.
            self.alone.grad = torch.full((3,), 0.1 * self.global_rank)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        weights = [getattr(p.detach(), "_local_tensor", p.detach()) for p in self.parameters()]
        self.weights.append([w.clone() for w in weights])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0, fused=fused)


class Barriers(TorchDispatchMode):
    count, watched = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.watched and "barrier" in func.overloadpacket.__name__:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        barriers.watched = True

    def on_train_batch_end(self, *args):
        barriers.watched = False


def loader():
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


skipping = GradientSkippingCallback(
    policy="zscore", sigmas=10.0, warmup_steps=10, start_after_n_steps=0, action=action,
    skip_non_finite=True, max_consecutive=5,
)
strategy = (
    ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if kind == "fsdp2"
    else DDPStrategy()
)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, callbacks=[Watch(), skipping],
    logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
)
model, barriers = Model(), Barriers()
with barriers:
    trainer.fit(model, loader())
torch.save(
    {"weights": model.weights, "state": skipping.state_dict(), "barriers": barriers.count},
    f"{folder}/rank{trainer.global_rank}.pt",
)
"""

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def train(run_on_two_ranks: Any) -> Any:
    def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
        run_on_two_ranks(SCRIPT, folder, *arguments)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]

    return run


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    ("kind", "action", "optimizer"),
    [
        ("ddp", "skip", "fused"),
        ("unsynced", "clip", "plain"),
        ("fsdp2", "skip", "fused"),
    ],
)
def test_all_ranks_learn_decide_and_scale_alike(train, kind, action, optimizer, tmp_path):
    """Though one rank's batch explodes, and where their norms differ too; sharded norms are whole."""
    first, second = train(tmp_path, kind, action, optimizer)
    state, history = first["state"], first["weights"]
    still = [i for i in range(1, len(history)) if same(history[i - 1], history[i])]

    assert same(state, second["state"])
    assert state["seen_steps"] == len(history) == 32
    assert state["statistics"][0]["count"] == 29
    if action == "skip":
        assert still == [20, 21, 26]
        assert state["skipped_steps"] == 3
    else:
        assert still == []
        assert (state["skipped_steps"], state["clipped_steps"]) == (0, 3)
    if kind == "ddp":
        assert same(history, second["weights"])


def test_sharded_norms_are_those_of_the_whole(train, tmp_path):
    """FSDP2 learns, to rounding, what DDP learns, and lets no barrier hold up the step."""
    (tmp_path / "ddp").mkdir()
    (tmp_path / "fsdp2").mkdir()
    whole, sharded = (train(tmp_path / kind, kind, "clip", "plain")[0] for kind in ("ddp", "fsdp2"))
    one, other = (run["state"]["statistics"][0] for run in (whole, sharded))

    assert one["mean"].item() == pytest.approx(other["mean"].item(), rel=1e-4)
    assert one["variance"].item() == pytest.approx(other["variance"].item(), rel=1e-3)
    assert whole["barriers"] == sharded["barriers"] == 0
