"""Every callback and logger of the package keeps what nshtrainer promises of such."""

from __future__ import annotations

from importlib.metadata import distribution
from importlib.util import find_spec

import pytest

from nshtrainer.testing import CallbackConformance, LoggerConformance, TinyModule
from nshtrainer_wandb import (
    ActSaveConfig,
    WandbCheckpointsCallbackConfig,
    WandbLoggerConfig,
    WandbUploadCodeCallbackConfig,
    WandbWatchCallbackConfig,
)


class SavingModule(TinyModule):
    """Hands its loss to ActSave."""

    def loss(self, batch):
        from nshutils.actsave import ActSave

        loss = super().loss(batch)
        ActSave({"loss": loss})
        return loss


@pytest.mark.skipif(find_spec("nshutils") is None, reason="the extra actsave is not installed")
class TestActSave(CallbackConformance):
    config = ActSaveConfig()
    syncs_every_step = True  # what is stored is copied to the host

    def module(self):
        return SavingModule()

    def manual_module(self):
        return SavingModule(optimizers=2)


class WithWandb(CallbackConformance):
    """Callbacks that do nothing without a W&B logger; not collected by itself."""

    def logger(self, config):
        return WandbLoggerConfig(offline=True).create_logger(config)


class TestWandbUploadCode(WithWandb):
    config = WandbUploadCodeCallbackConfig()

    @pytest.fixture(autouse=True)
    def _code(self, project):
        (project / "train.py").write_text("print('hello')")


class TestWandbCheckpoints(WithWandb):
    config = WandbCheckpointsCallbackConfig(upload="all")


class TestWandbWatch(WithWandb):
    config = WandbWatchCallbackConfig(log="all", log_freq=1)
    syncs_every_step = True  # it records at every batch here; see below for the others


def test_watch_adds_no_host_sync_between_records(tmp_path):
    """Only the batches that `log_freq` asks for wait for the device."""

    class Rarely(TestWandbWatch):
        config = WandbWatchCallbackConfig(log="all", log_freq=1000)
        syncs_every_step = False

    Rarely().test_adds_no_host_sync(tmp_path)


class TestWandbLogger(LoggerConformance):
    config = WandbLoggerConfig(offline=True)
    trainer_fields = {"project": "conformance"}


def test_everything_in_the_package_is_tested_here():
    """What is added to the entry points is added to this file."""
    points = distribution("nshtrainer-wandb").entry_points
    for group, kit in (
        ("nshtrainer.callbacks", CallbackConformance),
        ("nshtrainer.loggers", LoggerConformance),
    ):
        classes = [c for c in globals().values() if isinstance(c, type) and issubclass(c, kit)]
        names = {
            c.config.name for c in classes if c.__module__ == __name__ and hasattr(c, "config")
        }

        assert names == {p.name for p in points.select(group=group)}
