"""Callbacks for a plain Lightning trainer, read from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from nshtrainer import ConfigError, ConfigFileError, create_callbacks
from nshtrainer.callbacks.from_file import callbacks_from_file

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment

ACME = """
from typing import Literal
from lightning.pytorch import Callback
from nshtrainer import CallbackConfigBase

class AcmeCallback(Callback):
    def __init__(self, strength, epochs):
        self.strength, self.epochs = strength, epochs

class KeepingCallback(Callback):
    def state_dict(self):
        return {"a": 1}

class AcmeConfig(CallbackConfigBase):
    name: Literal["acme"] = "acme"
    strength: int = 1
    keeps: bool = False

    def create_callbacks(self, trainer_config):
        if self.keeps:
            yield KeepingCallback()
            return
        yield AcmeCallback(self.strength, trainer_config.max_epochs)
"""


@pytest.fixture(autouse=True)
def _acme(nshtrainer_plugins: PluginEnvironment) -> None:
    nshtrainer_plugins.fake_distribution(
        "acme", {"nshtrainer.callbacks": "acme = acme:AcmeConfig"}, modules={"acme": ACME}
    )


def read(tmp_path: Path, text: str, suffix: str = ".yaml") -> list[Callback]:
    """The callbacks of a file with *text*, without those that every run has."""
    path = tmp_path / f"callbacks{suffix}"
    path.write_text(text)
    return [c for c in callbacks_from_file(path) if type(c).__name__ == "AcmeCallback"]


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("- {name: acme, strength: 2}", ".yaml"),
        ("callbacks: [{name: acme, strength: 2}]", ".yaml"),
        ('[{"name": "acme", "strength": 2}]', ".json"),
        (json.dumps({"$schema": "x", "callbacks": [{"name": "acme", "strength": 2}]}), ".json"),
        ('[[callbacks]]\nname = "acme"\nstrength = 2', ".toml"),
    ],
)
def test_a_list_or_a_mapping_describes_callbacks(tmp_path: Path, text: str, suffix: str):
    """A list of callbacks, or what a `TrainerConfig` says, in each format."""
    (callback,) = read(tmp_path, text, suffix)

    assert callback.strength == 2


@pytest.mark.parametrize("text", ["- acme", "callbacks: [acme]", "[{name: acme}]"])
def test_a_name_alone_is_a_callback_with_its_defaults(tmp_path: Path, text: str):
    """As in `create_callbacks(["acme"])`."""
    (callback,) = read(tmp_path, text)

    assert callback.strength == 1


def test_fields_that_callbacks_look_at_are_taken_from_the_mapping(tmp_path: Path):
    """A callback sees the rest of the file as its trainer's configuration."""
    (callback,) = read(tmp_path, "max_epochs: 7\ncallbacks: [{name: acme}]")

    assert callback.epochs == 7


@pytest.mark.parametrize("text", ["", "[]", "callbacks: []", "# nothing"])
def test_slots_that_are_on_by_default_stay_off(tmp_path: Path, text: str):
    """A script that asked for nothing gets no checkpoints and no monitors."""
    path = tmp_path / "callbacks.yaml"
    path.write_text(text)

    assert not [c for c in callbacks_from_file(path) if "nshtrainer_" in type(c).__module__]


@pytest.mark.parametrize(
    ("text", "suffix", "says"),
    [
        (
            "- {name: acmee}",
            ".yaml",
            r"line 1, callbacks\[0\]: no callback is named 'acmee'. Did you mean 'acme'",
        ),
        (
            "- name: acme\n- name: acme\n  strenth: 2",
            ".yaml",
            r"line 3, callbacks\[1\].acme.strenth: .*'strength'",
        ),
        ("- acme\n- acmee", ".yaml", r"line 2, callbacks\[1\]: no callback is named 'acmee'"),
        (
            "callbacks:\n- name: acme\n  strenth: 2",
            ".yaml",
            r"line 3, callbacks\[0\].acme.strenth: .*'strength'",
        ),
        ("- {name: acme, strength: [", ".yaml", "not valid YAML: line 1"),
        ("hello", ".yaml", "a list of callbacks, or a mapping, is expected"),
        ("3", ".json", "a list of callbacks, or a mapping, is expected"),
        ("1: 2", ".yaml", "Keys should be strings"),
        ("x", ".ini", "the suffix '.ini' names no known format"),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_error(tmp_path: Path, text: str, suffix: str, says: str):
    """With the file, and field and line where there are such."""
    with pytest.raises(ConfigFileError, match=says) as caught:
        read(tmp_path, text, suffix)

    assert "callbacks" + suffix in str(caught.value)


def test_the_error_can_name_where_the_path_came_from(tmp_path: Path):
    """An environment variable, say, which the person who reads the message set."""
    path = tmp_path / "callbacks.yaml"
    path.write_text("hello")

    with pytest.raises(ConfigFileError, match=r"^VARIABLE=x: a list"):
        callbacks_from_file(path, "VARIABLE=x")
    with pytest.raises(ConfigFileError, match=r"^VARIABLE=x: there is no such file"):
        callbacks_from_file(tmp_path / "none.yaml", "VARIABLE=x")
    with pytest.raises(ConfigFileError, match=r"^VARIABLE=x: the suffix"):
        callbacks_from_file(tmp_path / "none.ini", "VARIABLE=x")


# ---- NSHTRAINER_CALLBACKS ----------------------------------------------------------------------


def lightning_trainer(*callbacks: Callback) -> pl.Trainer:
    """A trainer of a script that knows nothing of the variable."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )


def test_the_file_of_the_environment_is_found_again_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its path counts from where the first trainer was made; a missing one is named with the variable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSHTRAINER_CALLBACKS", "none.yaml")
    with pytest.raises(
        ConfigFileError, match=rf"NSHTRAINER_CALLBACKS=none.yaml \({tmp_path}/none.yaml\)"
    ):
        lightning_trainer()

    monkeypatch.setenv("NSHTRAINER_CALLBACKS", "callbacks.yaml")
    (tmp_path / "callbacks.yaml").write_text("- acme")
    (tmp_path / "elsewhere").mkdir()
    found = [names(lightning_trainer())]
    monkeypatch.chdir(tmp_path / "elsewhere")
    found.append(names(lightning_trainer()))

    assert found == [["AcmeCallback"]] * 2


def names(trainer: pl.Trainer) -> list[str]:
    return [type(c).__name__ for c in trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType] -- set in Lightning's connector


def test_a_callback_of_the_script_and_of_the_file_is_an_error_that_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One of them has to go, which the error says, unless the one in the file gives way."""
    path = tmp_path / "callbacks.yaml"
    path.write_text("- {name: acme, keeps: true}")
    monkeypatch.setenv("NSHTRAINER_CALLBACKS", str(path))
    mine = create_callbacks([{"name": "acme", "keeps": True}])

    with pytest.raises(
        ConfigError, match=r"callbacks\.yaml and the script's own .* same callback twice"
    ):
        lightning_trainer(*mine)
    path.write_text("- {name: acme, keeps: true, metadata: {ignore_if_exists: true}}")
    assert names(lightning_trainer(*mine)) == ["KeepingCallback"]
    path.write_text("- acme")
    assert names(lightning_trainer(*mine)) == ["KeepingCallback", "AcmeCallback"]
