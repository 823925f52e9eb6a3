from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = '''
import json, math, os, sys
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, DTensor
from torch.utils.data import DataLoader

from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradient_norms import measure_norms, non_finite_names
from nshtrainer.runtime.gradients import GradientRequest, StepOutcome
from nshtrainer.runtime.step_metrics import log_step_metrics

FUSED, DEVICE = sys.argv[2] == "fused", sys.argv[3] == "device"
RESULT = {}


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=FUSED)

    def train_dataloader(self):
        return DataLoader(torch.arange(48.0).reshape(16, 3) / 48, batch_size=2)


class Client(Callback):
    def setup(self, trainer, pl_module, stage):
        self.rank = trainer.global_rank
        RESULT.update(skipped=[], unchanged=[], events=0, totals=[])
        attach(trainer, "test").gradients.register(
            "test",
            request=lambda step: GradientRequest(totals=(2.0,)),
            decide=self.decide,
            outcome=self.outcome,
        )

    def decide(self, step):
        self.before = [p.detach().clone() for p in step.parameters]
        RESULT["totals"].append(step.norms.totals[2.0].item())
        log_step_metrics(step.trainer, {"norm": step.norms.totals[2.0]}, totals=["norm"])
        if step.step == 1 and self.rank == 0:
            return None  # this rank has no opinion; the other one wants to skip
        wants = step.step == 1 or (step.step == 2 and self.rank == 0)
        return StepOutcome(torch.tensor(wants) if DEVICE else wants, "spike")

    def outcome(self, step, skipped):
        RESULT["skipped"].append(bool(skipped))
        same = all(torch.equal(a, b) for a, b in zip(self.before, step.parameters))
        RESULT["unchanged"].append(same)

    def on_optimizer_step_skipped(self, trainer, pl_module, count, reasons):
        RESULT["events"] += count

    def on_train_start(self, trainer, pl_module):
        RESULT["sharded"] = sharded()


def sharded():
    """Norms of sharded gradients beside those of the whole ones, which every rank knows."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    rows, uneven, single, copies = (
        torch.randn(4, 3), torch.randn(5), torch.randn(1, 2), torch.randn(3)
    )
    whole = [rows, uneven, single, copies, 2 * copies]
    grads = [distribute_tensor(t, mesh, [Shard(0)]) for t in (rows, uneven, single)]
    grads.append(distribute_tensor(copies, mesh, [Replicate()]))
    grads.append(DTensor.from_local(copies, mesh, [Partial()]))
    names = ["rows", "uneven", "single", "copies", "partial"]
    error = 0.0
    norms = measure_norms(
        names, grads, totals=[1.0, 2.0, math.inf], per_parameter=[2.0, math.inf],
        finite=True, scale=None, device=torch.device("cpu"),
    )
    flat = torch.cat([t.flatten() for t in whole]).double()
    for p, total in norms.totals.items():
        expected = torch.linalg.vector_norm(flat, p)
        error = max(error, abs(total.double() / expected - 1).item())
    for p, each in norms.per_parameter.items():
        for norm, tensor in zip(each.values(), whole):
            expected = torch.linalg.vector_norm(tensor.double(), p)
            error = max(error, abs(norm.double() / expected - 1).item())
    rows[0, 0] = math.nan  # on rank 0 only
    grads[0] = distribute_tensor(rows, mesh, [Shard(0)])
    return {"error": error, "bad": non_finite_names(names, grads)}


def main():
    module = Module()
    trainer = Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Client()], log_every_n_steps=2,
    )
    trainer.fit(module)
    RESULT["weights"] = [p.tolist() for p in module.parameters()]
    RESULT["monitored"] = trainer.callback_metrics["norm"].item()
    with open(os.path.join(sys.argv[1], f"{trainer.global_rank}.json"), "w") as file:
        json.dump(RESULT, file)


main()
'''


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("optimizer", "flag"), [("plain", "host"), ("plain", "device"), ("fused", "device")]
)
def test_ranks_skip_together_and_norms_cover_all_shards(tmp_path, optimizer, flag):
    """One rank's wish is a skip on both, even where the other has no opinion; DTensors count whole."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), optimizer, flag],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))

    assert first["skipped"] == second["skipped"] == [False, True, True, False]
    assert first["unchanged"] == second["unchanged"] == [False, True, True, False]
    assert first["events"] == second["events"] == 2
    assert first["weights"] == second["weights"]
    assert first["totals"] == second["totals"]
    assert first["monitored"] == second["monitored"] == first["totals"][-1]
    for rank in (first, second):
        assert rank["sharded"]["error"] < 1e-5
        assert rank["sharded"]["bad"] == ["rows"]
