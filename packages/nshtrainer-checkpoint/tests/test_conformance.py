"""Every callback of the package keeps what nshtrainer promises of callbacks."""

from __future__ import annotations

from importlib.metadata import distribution

from nshtrainer.metric import MetricConfig
from nshtrainer.testing import CallbackConformance
from nshtrainer_checkpoint import (
    BestCheckpointCallbackConfig,
    CheckpointSavingConfig,
    LastCheckpointCallbackConfig,
    OnExceptionCheckpointCallbackConfig,
)

WALL_TIMES = ("train_seconds",)


class TestBestCheckpoint(CallbackConformance):
    config = BestCheckpointCallbackConfig(metric=MetricConfig(name="val_loss", mode="min"), topk=2)
    not_compared = WALL_TIMES


class TestLastCheckpoint(CallbackConformance):
    config = LastCheckpointCallbackConfig(topk=2)
    not_compared = WALL_TIMES


class TestOnExceptionCheckpoint(CallbackConformance):
    config = OnExceptionCheckpointCallbackConfig()
    not_compared = WALL_TIMES


class TestCheckpointSaving(CallbackConformance):
    config = CheckpointSavingConfig()
    trainer_fields = {"primary_metric": {"name": "val_loss", "mode": "min"}}
    not_compared = WALL_TIMES


def test_every_callback_of_the_package_is_tested_here():
    """A callback that is added to the entry points is added to this file."""
    points = distribution("nshtrainer-checkpoint").entry_points
    names = {point.name for point in points.select(group="nshtrainer.callbacks")}
    tested = [c for c in CallbackConformance.__subclasses__() if c.__module__ == __name__]

    assert {c.config.name for c in tested} == names
