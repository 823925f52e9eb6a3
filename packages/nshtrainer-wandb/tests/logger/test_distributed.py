from __future__ import annotations

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
def test_two_ranks_make_one_run(written, run_script):
    """Rank zero alone opens the run, watches and uploads; both ranks know its id and go on."""
    done = run_script(SCRIPT, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

    (run,) = written()
    ends = sorted(line for line in done.stdout.splitlines() if line.startswith("DONE"))
    assert ends == [f"DONE {rank} {run.id} 4" for rank in (0, 1)]
    assert run.exit_code == 0
    assert run.artifacts["code"] == ["train.py"]
    keys = {key for row in run.history for key in row}
    assert {"train/loss", "gradients/layer.bias/_type", "parameters/layer.bias/_type"} <= keys
