"""Lightning's TensorBoard logger, whose place is asked for at the first record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from nshtrainer.trainer.config import TrainerConfig

__all__ = ["LateTensorBoardLogger"]


class LateTensorBoardLogger(TensorBoardLogger):
    """Writes below the run's directory, which is settled only when the run starts.

    Args:
        config: The run's configuration.
        log_dir: Where to write instead of the run's directory.
        options: Arguments of Lightning's `TensorBoardLogger`.
    """

    def __init__(self, config: TrainerConfig, log_dir: Path | None, **options: Any) -> None:
        super().__init__(save_dir="", name=config.full_name, **options)
        self._config, self._chosen_dir = config, log_dir

    @property
    @override
    def save_dir(self) -> str:
        """The folder of all names and versions."""
        return os.fspath(
            self._chosen_dir or self._config.run.directory.subdirectory("log") / "tensorboard"
        )

    @property
    @override
    def root_dir(self) -> str:
        """The folder of all versions."""
        return os.path.join(self.save_dir, self.name)

    @property
    @override
    def version(self) -> str:
        """The run's id."""
        return self._config.run.id
