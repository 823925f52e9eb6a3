"""`TrainerConfig` as a value: its run, its seed, and the slots that are on by themselves."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from nshtrainer import TrainerConfig

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment

LOG_EPOCH = """
from typing import Literal
from nshtrainer import CallbackConfigBase

class DemandingConfig(CallbackConfigBase):
    name: Literal["log_epoch"] = "log_epoch"
    needed: int
"""


@pytest.fixture(autouse=True)
def only_core(isolated_plugins: Callable[..., None]) -> None:
    """The core alone."""


def test_the_run_follows_id_and_directory(tmp_path: Path):
    """Whatever way they are changed; what a copy was changed to does not reach the original."""
    config = TrainerConfig(id="a", directory={"project_root": tmp_path})
    assert config.run.directory.root == tmp_path / "nshtrainer_logs" / "a"

    other = config.model_copy(update={"id": "c"})
    config.id = "b"
    config.directory.project_root = tmp_path / "x"
    assert (config.run.id, other.run.id) == ("b", "c")
    assert config.run.directory.project_root == tmp_path / "x"
    config.directory = config.directory.replace(logdir_basename="runs")
    assert config.run.directory.root == tmp_path / "x" / "runs" / "b"


def test_a_plain_copy_is_the_same_run_and_a_changed_one_another():
    """An id that was made goes along with the pickled trainer, not with `replace`."""
    config = TrainerConfig()
    made = config.run.id

    assert config.run is config.run
    assert copy.deepcopy(config).run.id == made
    assert pickle.loads(pickle.dumps(config)).run.id == made
    assert config.replace(max_epochs=3).run.id != made
    assert config == TrainerConfig()  # the run is no part of the value


def test_a_seed_is_one_that_numpy_takes():
    """Up to 2**32 - 1; a larger one is refused when the config is made."""
    assert TrainerConfig(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ValidationError, match="less than or equal to 4294967295"):
        TrainerConfig(seed=2**32)


def test_a_default_slot_that_a_plugin_cannot_fill_is_left_out_and_told(
    nshtrainer_plugins: PluginEnvironment, caplog: pytest.LogCaptureFixture
):
    """A stranger's `log_epoch` with a required field costs no run; the warning names class and field."""
    nshtrainer_plugins.fake_distribution(
        "strict", {"nshtrainer.callbacks": "log_epoch = strict:DemandingConfig"}, modules={"strict": LOG_EPOCH}
    )  # fmt: skip
    nshtrainer_plugins.only("strict")

    with caplog.at_level(logging.WARNING, logger="nshtrainer"):
        made = [TrainerConfig(), TrainerConfig()]
    told = [record.getMessage() for record in caplog.records if "log_epoch" in record.getMessage()]

    assert [config.log_epoch for config in made] == [None, None]
    assert len(told) == 1
    assert (
        "strict.DemandingConfig cannot be made without options (needed: Field required)" in told[0]
    )
