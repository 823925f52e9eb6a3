"""Configuration of the Weights & Biases logger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.loggers.base import LoggerConfigBase, logger_registry
from nshtrainer.types import Int
from nshtrainer_wandb.checkpoints.config import WandbCheckpointsCallbackConfig
from nshtrainer_wandb.upload_code.config import WandbUploadCodeCallbackConfig
from nshtrainer_wandb.watch.config import WandbWatchCallbackConfig

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["WandbLoggerConfig"]


@logger_registry.register
class WandbLoggerConfig(LoggerConfigBase):
    """Logs to Weights & Biases, or, offline, to files that `wandb sync` uploads later.

    The W&B run has the id, name, tags and notes of the trainer's configuration. It is opened when
    the run starts and finished when `fit`, `validate`, `test` or `predict` ends, by an exception
    too; the next one on the same trainer continues it. A run that is already open in the process
    (of a sweep agent, say) is used, and left open.
    """

    name: Literal["wandb"] = "wandb"

    priority: Int = 2
    """Order among the loggers: higher comes earlier; the first one is `trainer.logger`."""

    project: str | None = Field(default=None, min_length=1)
    """The W&B project; None is that of the trainer's configuration, else the name of the project's
    folder."""

    entity: str | None = None
    """The user or team that the project belongs to; None is the account's default."""

    group: str | None = None
    """Joins several runs to one in W&B's tables."""

    job_type: str | None = None
    """What kind of run it is within its group, such as `train` or `eval`."""

    prefix: str = ""
    """Put before every metric's name, with `-` between."""

    log_model: Literal["all", "latest", "none"] | bool = False
    """Which checkpoints are uploaded, by the callback `wandb_checkpoints`: `all` when they are saved,
    `latest` (or true) those that are left at the end, `none` (or false) not any."""

    offline: bool | None = None
    """Whether nothing is sent. None follows `WANDB_MODE`, and without it is online exactly if an API
    key is configured: a run never waits for a login."""

    watch: WandbWatchCallbackConfig | None = Field(default_factory=WandbWatchCallbackConfig)
    """Histograms of gradients; null or false for none."""

    log_code: WandbUploadCodeCallbackConfig | None = Field(
        default_factory=WandbUploadCodeCallbackConfig
    )
    """Upload of the source code; null or false for none."""

    @field_validator("watch", "log_code", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """False is None, true the default, as in the slots of a trainer's configuration."""
        if value is False:
            return None
        return {} if value is True else value

    @override
    def create_logger(self, trainer_config: TrainerConfig) -> Logger | None:
        from nshtrainer_wandb.client import check_installed

        check_installed()
        from .logger import LateWandbLogger

        return LateWandbLogger(self, trainer_config)

    @override
    def companions(self, trainer_config: TrainerConfig) -> Iterable[CallbackConfigBase]:
        return tuple(self._companions())

    def _companions(self) -> Iterator[CallbackConfigBase]:
        if self.enabled:
            yield from (c for c in (self.watch, self.log_code) if c is not None and c.enabled)
            if self.log_model not in (False, "none"):
                upload = "all" if self.log_model == "all" else "latest"
                yield WandbCheckpointsCallbackConfig(upload=upload)
