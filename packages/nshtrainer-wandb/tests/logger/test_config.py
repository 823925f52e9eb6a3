from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from nshtrainer import TrainerConfig
from nshtrainer_wandb import WandbLoggerConfig


def test_configurations_import_neither_torch_nor_wandb():
    """Reading a configuration costs none of the heavy imports."""
    code = (
        "import sys, nshtrainer_wandb as w; w.WandbLoggerConfig(); w.ActSaveConfig();"
        "print([m for m in ('torch', 'lightning', 'wandb', 'numpy', 'nshutils') if m in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "fields",
    [
        {"log_model": "some"},
        {"project": ""},
        {"offline": "perhaps"},
        {"watch": {"log": "everything"}},
        {"watch": {"log_freq": 0}},
        {"log_code": {"exclude": [""]}},
        {"log_code": {"max_file_bytes": True}},
    ],
)
def test_nonsense_is_refused_when_the_configuration_is_read(fields):
    """What W&B would refuse during training, or ignore, is an error at once."""
    with pytest.raises(ValidationError):
        WandbLoggerConfig.model_validate(fields)


def test_companions_are_switched_by_true_false_and_null():
    """False and null leave a companion out, true brings its defaults."""
    config = WandbLoggerConfig.model_validate({"watch": False, "log_code": True})

    assert config.watch is None
    assert [c.identity for c in config.companions(TrainerConfig())] == ["wandb_upload_code"]


def test_disabled_logger_brings_no_companions():
    """`enabled: false` leaves nothing of the logger behind."""
    assert list(WandbLoggerConfig(enabled=False).companions(TrainerConfig())) == []


def test_configuration_survives_yaml():
    """A round trip through text changes nothing."""
    config = TrainerConfig.model_validate(
        {"loggers": [{"name": "wandb", "watch": {"log": "all"}, "log_code": None}]}
    )

    assert TrainerConfig.from_text(config.to_text()) == config
