"""nshtrainer-core from its wheel, with no family installed."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

FAMILIES = ("nshtrainer-checkpoint", "nshtrainer-ema", "nshtrainer-monitoring", "nshtrainer-wandb")
FIT = """
from nshtrainer import Trainer, TrainerConfig
from nshtrainer.testing import TinyDataModule, TinyModule
from nshtrainer.trainer.config import SLOTS

config = TrainerConfig(
    id="alone", max_epochs=1, accelerator="cpu", devices=1, log_every_n_steps=1,
    num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
)
assert [getattr(config, slot) for slot in SLOTS] == [None] * len(SLOTS), config
assert TrainerConfig.from_text(config.to_text("yaml"), "yaml") == config
module = TinyModule()
before = module.head.weight.detach().clone()
trainer = Trainer(config)
trainer.fit(module, datamodule=TinyDataModule())
assert not module.head.weight.equal(before)
print("steps", trainer.global_step)
"""


def test_plugins_lists_the_core_and_the_commands_for_the_rest(environment):
    """`nshtrainer plugins` shows the loggers of the core and how to get each family."""
    output = environment.run("nshtrainer", "plugins")

    assert "csv" in output
    assert "tensorboard" in output
    assert "2 plugins of 1 distributions, 0 of them with a fault" in output
    for family in FAMILIES:
        assert f"pip install {family}" in output


def test_a_real_fit_needs_no_family(environment):
    """A run trains, logs and is recorded; slots whose family is missing are off."""
    output = environment.python(FIT)

    assert "steps 4" in output
    run = environment.work / "nshtrainer_logs" / "alone"
    assert (run / "run.json").is_file()
    assert list(run.rglob("metrics.csv"))


def test_an_unknown_family_is_named_with_its_command(environment):
    """A file that names a callback of a missing family is refused with what to install."""
    file = environment.file("run.yaml", "callbacks:\n  - name: ema\n")

    output = environment.run("nshtrainer", "validate", file, check=False)

    assert "nshtrainer-ema" in output
    assert "pip install nshtrainer-ema" in output
    assert "Traceback" not in output


def test_importing_a_missing_config_names_the_command(environment):
    """`from nshtrainer.configs import X` says what provides X."""
    output = environment.python("from nshtrainer.configs import EMACallbackConfig", check=False)

    assert "PluginNotInstalledError: EMACallbackConfig is provided by nshtrainer-ema" in output
    assert "pip install nshtrainer-ema" in output


def test_a_missing_config_is_a_missing_module(environment):
    """Who guards an optional import with `except ModuleNotFoundError` is served."""
    code = (
        "try:\n    from nshtrainer.configs import EMACallbackConfig\n"
        "except ModuleNotFoundError:\n    print('guarded')"
    )

    assert environment.python(code).strip() == "guarded"


def test_reading_a_configuration_needs_no_torch(environment):
    """Where torch is not even installed, configs are read, written and validated."""
    file = environment.file("run.yaml", "max_epochs: 3\nloggers:\n  - name: csv\n")
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'lightning', 'numpy')))\n"  # not importable
        "from nshtrainer import TrainerConfig\n"
        f"print(TrainerConfig.from_file({str(file)!r}).max_epochs)"
    )

    assert environment.python(code).strip() == "3"
    assert environment.run("nshtrainer", "validate", file).startswith("ok")


def test_doctor_finds_no_fault_in_a_clean_environment(environment):
    """`nshtrainer doctor` has nothing to complain about after a plain installation."""
    environment.run("nshtrainer", "doctor")
