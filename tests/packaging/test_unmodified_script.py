"""A Lightning script that knows nothing of nshtrainer, and `NSHTRAINER_CALLBACKS`."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

SCRIPT = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = Trainer(
    max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2)))
print("steps", trainer.global_step)
print("callbacks", *(type(c).__name__ for c in trainer.callbacks))
print("nshtrainer is imported:", "nshtrainer" in sys.modules)
"""


@pytest.fixture
def script(environment):
    """The script, in an environment that has the core and one family."""
    environment.install(environment.wheel("nshtrainer-ema"))
    return environment.file("train.py", SCRIPT)


def test_an_unmodified_script_gets_the_callbacks_of_a_file(environment, script):
    """With the variable set, the callbacks of the file join a plain Lightning trainer."""
    environment.file("callbacks.yaml", "- name: ema\n  decay: 0.9\n")

    output = environment.run("python", script, NSHTRAINER_CALLBACKS="callbacks.yaml")

    assert "steps 4" in output
    (line,) = [line for line in output.splitlines() if line.startswith("callbacks")]
    assert "EMACallback" in line.split()


def test_without_the_variable_nothing_happens(environment, script):
    """Being installed costs an unmodified script nothing: nshtrainer is not even imported."""
    output = environment.run("python", script)

    assert "steps 4" in output
    assert "EMACallback" not in output
    assert "nshtrainer is imported: False" in output


def test_a_broken_file_stops_the_script_with_a_clear_error(environment, script):
    """A run that was asked to have callbacks does not start without them."""
    environment.file("callbacks.yaml", "- name: ema\n  decay: 2\n")

    output = environment.run("python", script, check=False, NSHTRAINER_CALLBACKS="callbacks.yaml")

    last = output[output.rindex("ConfigFileError") :]
    assert "NSHTRAINER_CALLBACKS=callbacks.yaml" in last
    assert "decay" in last
    assert "steps" not in output
