from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import sys, json
import torch
from lightning.pytorch import LightningModule, Trainer
from nshutils.actsave import ActSave
from nshtrainer_wandb import ActSaveCallback

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Identity()
        self.weight = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x = self.layer(torch.full((1, 1), float(self.global_rank)))
        ActSave({"mine": x})
        return self.weight(x).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1)
for name, ranks in (("all", "all"), ("zero", "zero"), ("one", [1])):
    Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ActSaveCallback(save_dir=name, include=["layer"], ranks=ranks)],
    ).fit(Model(), data)
try:
    Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ActSaveCallback(save_dir="no", ranks=[2])],
    ).fit(Model(), data)
except Exception as error:
    print("REFUSED", error, flush=True)
"""


def _stored(folder: Path) -> dict[str, list[float]]:
    return {
        str(path.relative_to(folder)): [
            float(np.load(f).item()) for f in sorted(path.glob("*.npy"))
        ]
        for path in folder.rglob("train.*")
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_chosen_ranks_store_each_in_its_own_folder(project: Path, run_script):
    """All, the first or some of them; outputs of modules and what the model hands over alike."""
    done = run_script(SCRIPT, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

    names = ("train.layer", "train.mine")
    steps = {"train.step": [0.0, 1.0, 2.0, 3.0]}
    zero, one = ({**dict.fromkeys(names, [float(r)] * 4), **steps} for r in (0, 1))
    assert _stored(project / "all") == {
        **{f"rank_0/0000/{name}": values for name, values in zero.items()},
        **{f"rank_1/0000/{name}": values for name, values in one.items()},
    }
    assert _stored(project / "zero") == {f"0000/{name}": values for name, values in zero.items()}
    assert _stored(project / "one") == {f"rank_1/0000/{name}": v for name, v in one.items()}
    assert not (project / "no").exists()
    assert done.stdout.count("`ranks` has 2, and there are 2 processes") == 2
