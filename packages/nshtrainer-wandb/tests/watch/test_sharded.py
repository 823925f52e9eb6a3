from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = """
import json, logging, sys, warnings
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from nshtrainer import Trainer

warnings.simplefilter("ignore")
FOUND = {}

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # 5 rows: the ranks hold parts of different sizes, and of the last layer one holds nothing.
        self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 1)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (self.first, self.second, self):
            fully_shard(module, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return (self.second(self.first(batch).relu()) - 1).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return DataLoader(torch.arange(32.0).reshape(8, 4) / 32, batch_size=2)

class Whole(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, parameter in pl_module.named_parameters():
            for kind, tensor in (("gradients", parameter.grad), ("parameters", parameter)):
                whole = tensor.full_tensor()
                FOUND[f"{kind}/{name}"] = [whole.numel(), float(whole.min()), float(whole.max())]

config = {
    "accelerator": "cpu", "devices": 2, "max_epochs": 1, "limit_train_batches": 2,
    "enable_progress_bar": False, "enable_model_summary": False, "checkpoint_saving": None,
    "loggers": [{"name": "wandb", "log_code": None, "watch": {"log": "all", "log_freq": 2}}],
}
strategy = ModelParallelStrategy(
    data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
)
trainer = Trainer(config, strategy=strategy, callbacks=[Whole()])
trainer.fit(Model())
if trainer.is_global_zero:
    json.dump(FOUND, open("found.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_histograms_of_sharded_tensors_are_those_of_the_whole(project: Path, written, run_script):
    """With FSDP2 each rank counts its part; rank zero records all elements between their extremes."""
    run_script(SCRIPT)  # Lightning starts the other rank itself

    (run,) = written()
    expected = json.loads((project / "found.json").read_text())
    (row,) = [row for row in run.history if "gradients/first.weight/values" in row]
    assert len(expected) == 8
    for name, (count, low, high) in expected.items():
        assert sum(row[f"{name}/values"]) == count
        if f"{name}/bins" in row:
            first, last = row[f"{name}/bins"][0], row[f"{name}/bins"][-1]
        else:
            first, width, number = (row[f"{name}/packedBins/{k}"] for k in ("min", "size", "count"))
            last = first + width * number
        assert (first, last) == pytest.approx((low, high), abs=1e-6)
