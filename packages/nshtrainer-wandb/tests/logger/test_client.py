from __future__ import annotations

import sys

import pytest

from nshtrainer import Trainer
from nshtrainer.errors import PluginLoadError, PluginNotInstalledError
from nshtrainer_wandb import client

ONLY_LOGGER = {"name": "wandb", "watch": None, "log_code": None}


def test_missing_wandb_is_an_error_when_the_trainer_is_made(make_config, monkeypatch):
    """The message has the command that installs it."""
    monkeypatch.setattr(client, "find_spec", lambda name: None)

    with pytest.raises(PluginNotInstalledError, match="run `pip install wandb`"):
        Trainer(make_config(loggers=[ONLY_LOGGER]))


def test_broken_wandb_is_an_error_before_training(
    make_config, model, batches, project, monkeypatch
):
    """A wandb that cannot be imported is named with its reason and what to do; nothing was trained."""
    broken = project / "broken"
    (broken / "wandb").mkdir(parents=True)
    (broken / "wandb" / "__init__.py").write_text("raise RuntimeError('two versions of protobuf')")
    monkeypatch.syspath_prepend(broken)
    for name in [n for n in sys.modules if n.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    before = model.layer.weight.detach().clone()

    with pytest.raises(PluginLoadError, match=r"two versions of protobuf.*pip install --upgrade"):
        Trainer(make_config(loggers=[ONLY_LOGGER])).fit(model, batches)

    assert before.equal(model.layer.weight)


def test_a_trainer_alone_does_not_import_wandb(make_config, monkeypatch):
    """With the logger, watch and uploads configured, wandb is imported when a run is opened."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)

    trainer = Trainer(make_config(loggers=[{"name": "wandb", "log_model": "all"}], id="r"))

    assert trainer.logger.version == "r"
    assert [name for name in sys.modules if name.partition(".")[0] == "wandb"] == []
