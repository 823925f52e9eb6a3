"""Lightning's TensorBoard logger, whose place is asked for at the first record."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from .place import LogPlace

__all__ = ["LateTensorBoardLogger"]


class LateTensorBoardLogger(TensorBoardLogger):
    """Writes below the run's directory, which is settled only when the run starts.

    Args:
        place: Where.
        options: Arguments of Lightning's `TensorBoardLogger`.
    """

    def __init__(self, place: LogPlace, **options: Any) -> None:
        super().__init__(save_dir="", name=place.name, **options)
        self._place = place

    @property
    @override
    def save_dir(self) -> str:
        """The folder of all names and versions."""
        return os.fspath(self._place.save_dir())

    @property
    @override
    def root_dir(self) -> str:
        """The folder of all versions."""
        return os.path.join(self.save_dir, self.name)

    @property
    @override
    def version(self) -> str:
        """The run's id."""
        return self._place.version()
