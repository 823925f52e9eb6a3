"""`LoggerConformance`: core's loggers pass, and each clause rejects a logger that breaks it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from pydantic import field_validator
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.loggers.base import LoggerConfigBase, logger_registry
from nshtrainer.loggers.csv import CSVLoggerConfig
from nshtrainer.testing import BrokenPromiseError, LoggerConformance

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig


class TestCSVLogger(LoggerConformance):
    config = CSVLoggerConfig(prefix="run", flush_logs_every_n_steps=1)


class Silent(CSVLogger):
    """Lightning's, in a folder that may be shared."""


class Deaf(Silent):
    @property
    def log_metrics(self):
        raise RuntimeError("no metrics, please")


class FailsAtTheEnd(Silent):
    def finalize(self, status):
        if status != "success":
            raise KeyError("mine")


class FailsSecondTime(Silent):
    times = 0

    def log_graph(self, *args, **kwargs):
        FailsSecondTime.times += 1
        if FailsSecondTime.times > 1:
            raise RuntimeError("used before")


ONE: dict[str, CSVLogger] = {}


@logger_registry.register
class FaultyLoggerConfig(LoggerConfigBase):
    """Makes a broken logger."""

    name: Literal["conformance_faulty_logger"] = "conformance_faulty_logger"
    fault: str = "Silent"
    """The class, or what is wrong."""

    @override
    def create_logger(self, trainer_config: TrainerConfig) -> Any:
        folder = trainer_config.directory.project_root or Path()
        if self.fault == "SameAgain":
            return ONE.setdefault("", Silent(folder))
        if self.fault == "NoLogger":
            return object()
        if self.fault == "WritesAtOnce":
            (folder / "too_early.txt").touch()
        if self.fault == "Nothing":
            return None
        return globals().get(self.fault, Silent)(folder)

    @override
    def companions(self, trainer_config: TrainerConfig) -> Any:
        found = {"StrangeCompanion": object(), "PickyCompanion": CompanionConfig()}
        return [found[self.fault]] if self.fault in found else []


@logger_registry.register
class AlwaysOnConfig(FaultyLoggerConfig):
    """Cannot be switched off."""

    name: Literal["conformance_always_on"] = "conformance_always_on"

    @field_validator("enabled")
    @classmethod
    def _always(cls, value: bool) -> bool:
        return True


class RefusesFastDevRun(Callback):
    def setup(self, trainer, pl_module, stage):
        if trainer.fast_dev_run or trainer.barebones:
            raise RuntimeError("not in this mode")


@callback_registry.register
class CompanionConfig(CallbackConfigBase):
    """A companion that cannot do without a logger."""

    name: Literal["conformance_companion"] = "conformance_companion"

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        yield self.with_metadata(RefusesFastDevRun(), enabled_for_barebones=True)


class Faulty(LoggerConformance):
    """Not collected: its clauses are called by hand."""

    def __init__(self, config: LoggerConfigBase) -> None:
        self.__dict__.update(config=config)


class TestPlainLightningLogger(LoggerConformance):
    config = FaultyLoggerConfig(fault="Silent")


@pytest.mark.parametrize(
    ("fault", "clause", "says"),
    [
        ("SameAgain", "makes_a_fresh_logger", "one object twice"),
        ("NoLogger", "makes_a_fresh_logger", "a lightning.pytorch Logger is expected"),
        ("WritesAtOnce", "makes_a_fresh_logger", "too_early.txt before anything is recorded"),
        ("StrangeCompanion", "companions_are_callback_configs", "CallbackConfigBase is expected"),
        ("Nothing", "receives_metrics_on_our_trainer", "gives 0 loggers"),
        ("Deaf", "receives_metrics_on_our_trainer", "no metrics, please"),
        ("Deaf", "receives_metrics_on_a_plain_trainer", "no metrics, please"),
        ("FailsSecondTime", "receives_metrics_on_our_trainer", "used before"),
        ("FailsAtTheEnd", "exception_surfaces", "KeyError.*surfaces"),
    ],
)
def test_a_broken_logger_is_rejected(fault: str, clause: str, says: str, tmp_path: Path):
    """The clause fails, by its own message or by the logger's own exception."""
    with pytest.raises(Exception, match=says):
        getattr(Faulty(FaultyLoggerConfig(fault=fault)), f"test_{clause}")(tmp_path)


def test_a_logger_that_cannot_be_switched_off_is_rejected(tmp_path: Path):
    """`enabled: false` must be kept."""
    with pytest.raises(BrokenPromiseError, match="when it is not enabled"):
        Faulty(AlwaysOnConfig()).test_is_left_out_when_not_enabled(tmp_path)


@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_a_companion_that_fails_in_a_reduced_mode_is_rejected(mode: str, tmp_path: Path):
    """What comes with a logger runs where Lightning takes the logger away."""
    with pytest.raises(RuntimeError, match="not in this mode"):
        Faulty(FaultyLoggerConfig(fault="PickyCompanion")).test_runs_in_reduced_modes(
            mode, tmp_path
        )


def test_a_broken_logger_config_is_rejected(tmp_path: Path):
    """Clauses of configurations hold for loggers too."""

    class Unregistered(LoggerConfigBase):
        """Nobody finds it."""

        name: Literal["conformance_unregistered_logger"] = "conformance_unregistered_logger"

    with pytest.raises(BrokenPromiseError, match="logger_registry"):
        Faulty(Unregistered()).test_is_found_by_its_name()


def test_files_that_were_there_before_are_not_the_loggers(tmp_path: Path):
    """What an author's fixture puts into `tmp_path` is not held against the logger."""
    (tmp_path / "project").mkdir()
    Faulty(CSVLoggerConfig()).test_makes_a_fresh_logger(tmp_path)
