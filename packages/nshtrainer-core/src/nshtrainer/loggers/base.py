"""`LoggerConfigBase`: the configuration of a logger, found by its `name`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, runtime_checkable

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.config import Config
from nshtrainer.plugins import catalogue
from nshtrainer.plugins.manifest import LOGGERS
from nshtrainer.registry import Registry
from nshtrainer.types import Int

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["ANNOUNCES_CHECKPOINTS", "LoggerConfigBase", "RunDescriber", "logger_registry"]

ANNOUNCES_CHECKPOINTS: Final = "announces_checkpoints"
"""Attribute of a checkpoint callback, true if it emits `on_checkpoint_saved`: a logger that uploads
what it hears of so leaves it alone in Lightning's `after_save_checkpoint`."""


@runtime_checkable
class RunDescriber(Protocol):
    """A logger that says where its run is; what it says is written beside every checkpoint."""

    def describe_run(self) -> Mapping[str, Any]:
        """Return plain data under a name of its own, such as `{"wandb": {"id": ..., "url": ...}}`.

        Called on rank zero for each save, also by a thread: it opens nothing and waits for nothing.
        """
        ...


class LoggerConfigBase(Config):
    """Base of every logger configuration.

    A subclass has a line `name: Literal["my_logger"] = "my_logger"`, is registered by
    `@logger_registry.register` or an entry point, and implements `create_logger`.
    """

    one_per_folder: ClassVar[bool] = False
    """Whether two loggers of this name would write the same files in one `log_dir`; a run refuses that."""

    enabled: bool = True
    """Whether the logger, and what comes with it, is used."""

    priority: Int = 0
    """Order among the loggers: higher comes earlier; the first one is `trainer.logger`."""

    log_dir: Path | None = None
    """Where the logger writes; None is `<run>/log/<name>`."""

    def create_logger(self, trainer_config: TrainerConfig) -> Logger | None:
        """Return the Lightning logger; None if it cannot be used and says so itself.

        Called while the trainer is built: id and directory of `trainer_config.run` may not be settled
        yet, so read them when the first record is written.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not implement create_logger")

    def companions(self, trainer_config: TrainerConfig) -> Iterable[CallbackConfigBase]:
        """Configurations of callbacks that come with this logger; none by default."""
        return ()


logger_registry: Registry[LoggerConfigBase] = Registry(
    LOGGERS, LoggerConfigBase, what="logger", known=catalogue.LOGGERS
)
"""Logger name -> configuration class."""
