from __future__ import annotations

import sys

import pytest
from pydantic import ValidationError

from nshtrainer import create_callbacks
from nshtrainer.errors import PluginLoadError
from nshtrainer_wandb import ActSaveConfig


def test_missing_library_is_named_when_the_trainer_is_built(monkeypatch: pytest.MonkeyPatch):
    """Not in the middle of training, and with the command that helps."""
    monkeypatch.setitem(sys.modules, "nshutils", None)  # as if it were not installed

    with pytest.raises(PluginLoadError, match=r"pip install nshtrainer-wandb\[actsave\]"):
        create_callbacks(["act_save"])


def test_switched_off_the_library_is_not_needed(monkeypatch: pytest.MonkeyPatch):
    """A configuration that mentions it but does not use it works everywhere."""
    monkeypatch.setitem(sys.modules, "nshutils", None)

    assert create_callbacks([{"name": "act_save", "enabled": False}]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduce": ["mean"]}, "`include` names none; set it"),
        ({"exclude": ["a"]}, "`include` names none; set it"),
        ({"include": ["a"], "reduce": ["mean", "mean"]}, "names one twice: mean, mean"),
        ({"include": ["a"], "reduce": ["median"]}, "'mean', 'l2_norm' or 'histogram'"),
        ({"include": [""]}, "at least 1 character"),
        ({"every_n_steps": 0}, "greater than 0"),
        ({"max_bytes": 0}, "greater than 0"),
        ({"ranks": []}, "at least one rank"),
        ({"ranks": [-1]}, "none below 0"),
    ],
)
def test_options_that_say_nothing_are_refused(fields, message: str):
    """With what was expected, before anything runs."""
    with pytest.raises(ValidationError, match=message):
        ActSaveConfig(**fields)
