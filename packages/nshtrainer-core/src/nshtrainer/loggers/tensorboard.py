"""TensorBoard event files."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from .base import LoggerConfigBase, logger_registry

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["TensorboardLoggerConfig"]


@logger_registry.register
class TensorboardLoggerConfig(LoggerConfigBase):
    """Writes TensorBoard event files to `<run>/log/tensorboard/<name>/<run id>`."""

    one_per_folder: ClassVar[bool] = True

    name: Literal["tensorboard"] = "tensorboard"

    prefix: str = ""
    """Put before every metric's name, with `-` between."""

    log_graph: bool = False
    """Whether the model's graph is written; needs `example_input_array` on the module."""

    default_hp_metric: bool = True
    """Whether a placeholder `hp_metric` is written, so that hyper-parameters show at once."""

    @override
    def create_logger(self, trainer_config: TrainerConfig) -> Logger | None:
        """Return the logger.

        Raises:
            PluginLoadError: Neither tensorboard nor tensorboardX is installed.
        """
        from nshtrainer.errors import PluginLoadError

        if not any(importlib.util.find_spec(m) for m in ("tensorboard", "tensorboardX")):
            raise PluginLoadError(
                "the logger 'tensorboard' needs the package tensorboard, which is not installed; "
                "run `pip install nshtrainer-core[tensorboard]`"
            )
        from .place import LogPlace
        from .tensorboard_logger import LateTensorBoardLogger

        options: dict[str, Any] = {
            "prefix": self.prefix,
            "log_graph": self.log_graph,
            "default_hp_metric": self.default_hp_metric,
        }
        return LateTensorBoardLogger(
            LogPlace(trainer_config, "tensorboard", self.log_dir), **options
        )
