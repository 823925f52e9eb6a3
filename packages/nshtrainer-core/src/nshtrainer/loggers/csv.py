"""CSV files: one row a step, appended to when a run is resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from nshtrainer.types import PositiveInt

from .base import LoggerConfigBase, logger_registry

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["CSVLoggerConfig"]


@logger_registry.register
class CSVLoggerConfig(LoggerConfigBase):
    """Writes `<run>/log/csv/<name>/<run id>/metrics.csv`, what was logged at one step in one row."""

    one_per_folder: ClassVar[bool] = True

    name: Literal["csv"] = "csv"

    prefix: str = ""
    """Put before every metric's name, with `-` between."""

    flush_logs_every_n_steps: PositiveInt = 100
    """How many rows are kept in memory at most; they are written after 5 s in any case."""

    @override
    def create_logger(self, trainer_config: TrainerConfig) -> Logger | None:
        from .csv_logger import MergingCSVLogger
        from .place import LogPlace

        place = LogPlace(trainer_config, "csv", self.log_dir)
        return MergingCSVLogger(
            place.save_dir,
            name=place.name,
            version=place.version,
            prefix=self.prefix,
            flush_logs_every_n_steps=self.flush_logs_every_n_steps,
        )
