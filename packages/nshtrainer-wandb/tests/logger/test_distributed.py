from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from nshtrainer import Trainer

config = {
    "accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, "limit_val_batches": 0,
    "limit_train_batches": 4, "log_every_n_steps": 1, "enable_progress_bar": False,
    "enable_model_summary": False, "checkpoint_saving": None,
    "loggers": [{"name": "wandb", "watch": {"log": "all", "log_freq": 2}}],
}
class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        self.log("train/loss", result["loss"])
        return result

trainer = Trainer(config)
trainer.fit(Model())
print("DONE", trainer.global_rank, trainer.config.run.id, trainer.global_step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_make_one_run(project: Path, written):
    """Rank zero alone opens the run, watches and uploads; both ranks know its id and go on."""
    (project / "train.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]

    done = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = written()
    ends = sorted(line for line in done.stdout.splitlines() if line.startswith("DONE"))
    assert ends == [f"DONE {rank} {run.id} 4" for rank in (0, 1)]
    assert run.exit_code == 0
    assert run.artifacts["code"] == ["train.py"]
    keys = {key for row in run.history for key in row}
    assert {"train/loss", "gradients/layer.bias/_type", "parameters/layer.bias/_type"} <= keys
