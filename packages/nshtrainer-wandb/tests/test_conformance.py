"""Every callback and logger of the package keeps what nshtrainer promises of such."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import distribution

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


class TestActSave(CallbackConformance):
    config = ActSaveConfig()
    syncs_every_step = True  # what is stored is copied to the host

    def module(self):
        return SavingModule()

    def manual_module(self):
        return SavingModule(optimizers=2)


class TestActSaveOfModules(CallbackConformance):
    config = ActSaveConfig(include=["*"], reduce=["mean", "histogram"])
    syncs_every_step = True  # as above; see below for the steps between


@pytest.mark.parametrize(("every_n_steps", "waits"), [(1, True), (1000, False)])
def test_act_save_waits_for_the_device_at_stored_steps_only(tmp_path, every_n_steps, waits):
    """Between them nothing does, though the module hands its loss over at each."""

    class Stores(TestActSave):
        config = ActSaveConfig(include=["*"], every_n_steps=every_n_steps)

    kit = Stores()
    expected = kit._syncs(tmp_path / "without", with_callbacks=False)
    found = kit._syncs(tmp_path / "with", with_callbacks=True)
    measured = sorted(found)  # the first step is not

    assert len(measured) > 1
    for step in measured:
        assert bool(found[step] - expected.get(step, Counter())) is waits


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
