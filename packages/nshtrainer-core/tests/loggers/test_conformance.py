"""Both loggers of the core keep what nshtrainer promises of loggers."""

from __future__ import annotations

from importlib.metadata import distribution
from importlib.util import find_spec

import pytest

from nshtrainer.loggers.csv import CSVLoggerConfig
from nshtrainer.loggers.tensorboard import TensorboardLoggerConfig
from nshtrainer.testing import LoggerConformance


class TestCSVLogger(LoggerConformance):
    config = CSVLoggerConfig(prefix="run", flush_logs_every_n_steps=1)


@pytest.mark.skipif(
    not (find_spec("tensorboard") or find_spec("tensorboardX")),
    reason="the extra tensorboard is not installed",
)
class TestTensorboardLogger(LoggerConformance):
    config = TensorboardLoggerConfig(prefix="run")


def test_every_logger_of_the_core_is_tested_here():
    """A logger that is added to the entry points is added to this file."""
    points = distribution("nshtrainer-core").entry_points
    names = {point.name for point in points.select(group="nshtrainer.loggers")}
    tested = [c for c in LoggerConformance.__subclasses__() if c.__module__ == __name__]

    assert {c.config.name for c in tested} == names
