from __future__ import annotations

import logging

import pytest
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import Logger

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.loggers.base import RunDescriber
from nshtrainer.trainer.record import describe_run


class SaysWhere(Logger):
    """A logger of somebody else's that says where its run is, or fails to."""

    name, version = "says_where", 0

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    def log_metrics(self, metrics, step=None) -> None:
        """Nowhere."""

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Nowhere."""

    def describe_run(self):
        if self.fails:
            raise RuntimeError("the run is gone")
        return {"says_where": {"id": "7", "url": "https://example.org/7"}}


def _of_config(tmp_path, logger):
    config = TrainerConfig.model_validate(
        {"loggers": [], "checkpoint_saving": None, "directory": {"project_root": tmp_path}}
    )
    return Trainer(config, logger=logger)


def _plain(tmp_path, logger):
    return LightningTrainer(logger=logger, default_root_dir=tmp_path, accelerator="cpu")


@pytest.mark.parametrize("make", [_of_config, _plain])
def test_loggers_say_where_their_runs_are(make, tmp_path):
    """What a logger tells is in what is written beside a checkpoint; on a plain trainer too."""
    logger = SaysWhere()

    assert isinstance(logger, RunDescriber)
    assert describe_run(make(tmp_path, logger))["loggers"] == logger.describe_run()


def test_logger_that_fails_costs_no_checkpoint(tmp_path, caplog):
    """It is left out, and named."""
    with caplog.at_level(logging.WARNING, "nshtrainer"):
        described = describe_run(_of_config(tmp_path, SaysWhere(fails=True)))

    assert described["loggers"] == {}
    assert "SaysWhere does not say where its run is: the run is gone" in caplog.text
