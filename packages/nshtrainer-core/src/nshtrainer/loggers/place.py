"""Where a logger writes, told when the first record is written: the run is settled only then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nshtrainer.run.identity import folder_name

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["LogPlace"]


@dataclass(frozen=True)
class LogPlace:
    """The folders of one logger. It is pickled with its trainer, for processes that are spawned.

    Args:
        config: The run's configuration.
        kind: Names the folder below the run's `log`.
        chosen: Where to write instead of there.
    """

    config: TrainerConfig
    kind: str
    chosen: Path | None = None

    def save_dir(self) -> Path:
        """The folder of all names and versions."""
        if self.chosen is not None:
            return self.chosen.expanduser()
        return self.config.run.directory.subdirectory("log") / self.kind

    def version(self) -> str:
        """The run's id."""
        return self.config.run.id

    @property
    def name(self) -> str:
        """The run's name as one folder; it may hold anything, so it must not lead elsewhere."""
        return folder_name(self.config.full_name)
