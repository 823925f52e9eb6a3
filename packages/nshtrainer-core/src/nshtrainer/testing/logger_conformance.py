"""`LoggerConformance`: the clauses of a logger, as a test class to inherit.

    class TestMyLogger(LoggerConformance):
        config = MyLoggerConfig()

Each test is one clause and its docstring the law.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.factory_guard import without_factories
from nshtrainer.loggers.base import LoggerConfigBase, logger_registry
from nshtrainer.trainer.config import TrainerConfig
from nshtrainer.trainer.trainer import Trainer as OurTrainer

from .config_clauses import ConfigClauses
from .models import TinyDataModule, TinyModule, quiet_trainer_kwargs
from .probes import plant_failure, quiet_and_seeded
from .promises import promise

__all__ = ["LoggerConformance"]


class LoggerConformance(ConfigClauses):
    """What nshtrainer expects of a logger and its configuration; inherit and set `config`.

    Attributes:
        config: The configuration under test; one that needs no network.
        trainer_fields: More fields of `TrainerConfig`, such as `project`.
    """

    config: ClassVar[LoggerConfigBase]
    trainer_fields: ClassVar[Mapping[str, Any]] = {}
    registry = logger_registry
    field = "loggers"

    def trainer_config(self, folder: Path, **fields: Any) -> TrainerConfig:
        """The run of one clause: only the logger under test, writing below *folder*."""
        quiet = quiet_trainer_kwargs(folder)
        for name in ("default_root_dir", "logger", "enable_checkpointing"):
            del quiet[name]
        where = {"id": "conformance", "directory": {"project_root": folder}}
        return self.in_trainer_config(**{**quiet, **where, **self.trainer_fields, **fields})

    def test_makes_a_fresh_logger(self, tmp_path: Path) -> None:
        """Each call of `create_logger` returns a new Lightning logger, and writes nothing yet.

        When it is called the run's directory may not be settled, and the run may never start.
        """
        config = self.own_config()
        before = {*tmp_path.rglob("*")}  # what the author's fixtures made
        one, other = (config.create_logger(self.trainer_config(tmp_path)) for _ in "12")
        for logger in (one, other):
            promise(
                isinstance(logger, Logger),
                f"{self._cls}.create_logger returns {logger!r}; a lightning.pytorch Logger is expected",
            )
        promise(
            one is not other, f"{self._cls}.create_logger returns one object twice; make a new one"
        )
        written = sorted(str(p.relative_to(tmp_path)) for p in {*tmp_path.rglob("*")} - before)
        promise(
            not written,
            f"{self._cls}.create_logger writes {', '.join(written)} before anything is recorded; make "
            f"files and folders at the first record",
        )

    def test_companions_are_callback_configs(self, tmp_path: Path) -> None:
        """`companions` gives configurations of callbacks."""
        for companion in self.own_config().companions(self.trainer_config(tmp_path)):
            promise(
                isinstance(companion, CallbackConfigBase),
                f"{self._cls}.companions gives {companion!r}; a CallbackConfigBase is expected",
            )

    def test_receives_metrics_on_our_trainer(self, tmp_path: Path) -> None:
        """`nshtrainer.Trainer` trains with it, twice, and gives it the metrics."""
        trainer = OurTrainer(self.trainer_config(tmp_path))
        promise(
            len(trainer.loggers) == 1, f"{self._cls} gives {len(trainer.loggers)} loggers, not 1"
        )
        self._receives_metrics(trainer)
        assert trainer.fit_loop.max_epochs is not None  # noqa: S101 -- ours, for the type checker
        trainer.fit_loop.max_epochs += 1
        self._receives_metrics(trainer)

    def test_receives_metrics_on_a_plain_trainer(self, tmp_path: Path) -> None:
        """`lightning.pytorch.Trainer` trains with what `create_logger` returns."""
        logger = self.own_config().create_logger(self.trainer_config(tmp_path))
        kwargs = quiet_trainer_kwargs(tmp_path, logger=logger)
        with without_factories():
            trainer = Trainer(**kwargs)
        self._receives_metrics(trainer)

    def test_is_left_out_when_not_enabled(self, tmp_path: Path) -> None:
        """`enabled: false` makes no logger and no companions."""
        off = self.own_config().replace(enabled=False)
        trainer = OurTrainer(self.trainer_config(tmp_path, loggers=[off]))
        promise(not trainer.loggers, f"{self._cls} makes {trainer.loggers} when it is not enabled")

    @pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
    def test_runs_in_reduced_modes(self, mode: str, tmp_path: Path) -> None:
        """A fast dev run and barebones mode, which use no logger, go to their end."""
        fields = {"log_every_n_steps": None, mode: True}
        trainer = OurTrainer(self.trainer_config(tmp_path, **fields))
        self._fit(trainer, TinyModule())
        promise(trainer.state.finished, f"{mode} with {self._cls} did not finish")

    def test_exception_surfaces(self, tmp_path: Path) -> None:
        """The exception of a training step surfaces, and not one of the logger's."""
        module = TinyModule()
        error = plant_failure(module, "training_step", 1)
        surfaced: BaseException | None = None
        try:
            self._fit(OurTrainer(self.trainer_config(tmp_path)), module)
        except BaseException as caught:  # noqa: BLE001 -- whatever surfaces is compared
            surfaced = caught
        promise(surfaced is error, f"{surfaced!r} surfaces with {self._cls}, not {error!r}")

    def _receives_metrics(self, trainer: Trainer) -> None:
        assert trainer.logger is not None  # noqa: S101 -- checked before
        received: set[str] = set()
        attributes: dict[str, Any] = vars(trainer.logger)
        original = trainer.logger.log_metrics

        def noting(metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
            received.update(metrics)
            original(metrics, *args, **kwargs)

        attributes["log_metrics"] = noting
        try:
            self._fit(trainer, TinyModule())
        finally:
            del attributes["log_metrics"]
        promise(
            {"train_loss", "val_loss"} <= received,
            f"the logger of {self._cls} was given {sorted(received)}, not the module's metrics",
        )

    def _fit(self, trainer: Trainer, module: LightningModule) -> None:
        with quiet_and_seeded():
            trainer.fit(module, datamodule=TinyDataModule())
