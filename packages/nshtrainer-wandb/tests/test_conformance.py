"""Every callback and logger of the package keeps what nshtrainer promises of such."""

from __future__ import annotations

from importlib.metadata import distribution
from importlib.util import find_spec

import pytest

from nshtrainer.testing import CallbackConformance, LoggerConformance, TinyModule
from nshtrainer_wandb import (
    ActSaveConfig,
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

    def module(self):
        return SavingModule()

    def manual_module(self):
        return SavingModule(optimizers=2)


class TestWandbUploadCode(CallbackConformance):
    config = WandbUploadCodeCallbackConfig()


class TestWandbWatch(CallbackConformance):
    config = WandbWatchCallbackConfig(log="all", log_freq=1)


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
        tested = [c for c in kit.__subclasses__() if c.__module__ == __name__]

        assert {c.config.name for c in tested} == {p.name for p in points.select(group=group)}
