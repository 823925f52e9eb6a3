"""`Run`: the identity and the directory of one run, settled once for all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nshtrainer.directory import DirectoryConfig
from nshtrainer.errors import NshTrainerError

from .directory import RunDirectory
from .identity import known_run_id, new_run_id

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Run"]


class Run:
    """A run before, while and after it is trained.

    The id is the configured one, else the launch's (`NSHTRAINER_RUN_ID`), else made by rank zero
    and broadcast in `settle`: under torchrun every rank would make its own. Nothing is created on
    disk until something is written.

    Args:
        directory: Where runs write.
        run_id: The configured id.
    """

    def __init__(self, directory: DirectoryConfig, run_id: str | None = None) -> None:
        self._directory = directory
        self._id = run_id
        self._settled = False

    @property
    def known_id(self) -> str | None:
        """The id if it is known yet; asking does not make one."""
        return self._id or known_run_id()

    @property
    def id(self) -> str:
        """The id; made now if it is not known, which only rank zero may do before `settle`.

        Raises:
            NshTrainerError: This is another rank and the id has not been broadcast yet.
        """
        if self._id is None:
            self._id = known_run_id()
        if self._id is None:
            from lightning.fabric.utilities.rank_zero import rank_zero_only

            if getattr(rank_zero_only, "rank", 0) not in (0, None):
                raise NshTrainerError(
                    "the run's id was read on a rank other than zero before the run started; "
                    "read it in or after `setup`, or set `id` in the config"
                )
            self._id = new_run_id()
        return self._id

    @property
    def directory(self) -> RunDirectory:
        """The paths of the run; see `RunDirectory`."""
        root = self._directory.project_root or Path.cwd()
        return RunDirectory(root, self.id, self._directory.logdir_basename)

    @property
    def known_directory(self) -> RunDirectory | None:
        """The paths of the run if its id is known yet."""
        return None if self.known_id is None else self.directory

    def settle(self, trainer: Trainer) -> str:
        """Agree on the id over all ranks, and return it.

        A collective: call it on every rank, in `setup` or later.

        Raises:
            NshTrainerError: The ranks are not connected yet, and this is not rank zero.
        """
        if not self._settled:
            agreed = trainer.strategy.broadcast(self.id if trainer.is_global_zero else None)
            if agreed is not None:  # None: no process group yet, so nothing came from rank zero
                self._id, self._settled = agreed, True
        return self.id
