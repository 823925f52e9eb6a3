from __future__ import annotations

from pathlib import Path

import pytest

from nshtrainer.errors import ConfigError
from nshtrainer_wandb.logger.choices import (
    check_tags,
    choose_mode,
    choose_project,
    has_credentials,
)


@pytest.mark.parametrize(
    ("offline", "wandb_mode", "has_key", "expected"),
    [
        (None, None, True, "online"),
        (None, None, False, "offline"),
        (None, "offline", True, "offline"),
        (None, "shared", False, "shared"),
        (False, "offline", False, "online"),
        (True, "online", True, "offline"),
        (False, "disabled", True, "disabled"),
    ],
)
def test_mode_is_configured_then_from_the_environment_then_by_key(
    offline, wandb_mode, has_key, expected
):
    """A configured mode wins, but not over a W&B that is switched off; without a key: offline."""
    assert choose_mode(offline, wandb_mode=wandb_mode, has_key=has_key) == expected


def test_project_is_the_loggers_then_the_trainers_then_the_folders(tmp_path: Path):
    """The nearest configured name is used; without one, the project folder's, made acceptable."""
    folder = tmp_path / "a#b"

    assert choose_project("mine", "theirs", folder) == "mine"
    assert choose_project(None, "theirs", folder) == "theirs"
    assert choose_project(None, None, folder) == "a-b"
    assert choose_project(None, None, Path("/")) == "nshtrainer"


@pytest.mark.parametrize("name", ["a/b", "what?", "x" * 129])
def test_project_that_wandb_refuses_is_an_error_before_the_run(name: str):
    """A name that W&B would refuse when the run starts is refused when the trainer is built."""
    with pytest.raises(ConfigError, match="Set `project`"):
        choose_project(name, None, Path())


def test_tag_that_wandb_refuses_is_an_error_before_the_run():
    """So is a tag that is too long; no tags are None."""
    with pytest.raises(ConfigError, match="Shorten it"):
        check_tags(["ok", "x" * 65])

    assert check_tags([]) is None
    assert check_tags(["ok"]) == ("ok",)


def test_credentials_are_found_in_environment_and_netrc(tmp_path: Path):
    """A key counts wherever W&B would find it, and only for its own host."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password abc\n")
    environ = {"NETRC": str(netrc)}

    assert has_credentials("https://api.wandb.ai", environ)
    assert not has_credentials("https://elsewhere.example", environ)
    assert not has_credentials("https://api.wandb.ai", {"HOME": str(tmp_path)})
    assert has_credentials("https://api.wandb.ai", {"WANDB_API_KEY": "k", "HOME": str(tmp_path)})
