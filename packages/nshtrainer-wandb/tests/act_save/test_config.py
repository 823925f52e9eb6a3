from __future__ import annotations

import importlib.util

import pytest

from nshtrainer import create_callbacks
from nshtrainer.errors import PluginLoadError


@pytest.mark.skipif(
    importlib.util.find_spec("nshutils") is not None, reason="shows what happens without nshutils"
)
def test_missing_library_is_named_when_the_trainer_is_built():
    """Not in the middle of training, and with the command that helps."""
    with pytest.raises(PluginLoadError, match=r"pip install nshtrainer-wandb\[actsave\]"):
        create_callbacks(["act_save"])


def test_switched_off_the_library_is_not_needed():
    """A configuration that mentions it but does not use it works everywhere."""
    assert create_callbacks([{"name": "act_save", "enabled": False}]) == []
