"""The package as a whole: what it costs to import, and what its names are."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import nshtrainer_ema
from nshtrainer import callback_registry
from nshtrainer_ema import EMACallbackConfig


def test_configurations_cost_no_torch():
    """A login node can validate them."""
    code = (
        "import sys, nshtrainer_ema as e; e.EMACallbackConfig(decay=0.9);"
        "print([m for m in ('torch', 'lightning', 'numpy', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    """`__all__` is sorted and real; other names are not there."""
    assert sorted(nshtrainer_ema.__all__) == nshtrainer_ema.__all__
    for name in nshtrainer_ema.__all__:
        assert getattr(nshtrainer_ema, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nshtrainer_ema.no_such_name


def test_entry_points_lead_to_the_configurations():
    """Each name of the family is found by the registry, without importing this package."""
    mine = [e for e in entry_points(group="nshtrainer.callbacks") if "nshtrainer_ema" in e.value]

    assert len(mine) == 4
    for point in mine:
        assert callback_registry[point.name] is point.load()


def test_configurations_survive_json_and_yaml():
    """With their label and metadata."""
    config = EMACallbackConfig(decay=0.999, label="slow", metadata={"priority": 3})

    for format_ in ("json", "yaml"):
        assert EMACallbackConfig.from_text(config.to_text(format_), format_) == config
