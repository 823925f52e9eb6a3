"""`Run`: the identity and the directory of one run, settled once for all ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nshtrainer.directory import DirectoryConfig
from nshtrainer.errors import ConfigError, NshTrainerError

from .directory import RunDirectory
from .identity import known_run_id, new_run_id

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Run", "check_root", "project_root"]


def project_root(directory: DirectoryConfig) -> Path:
    """The folder of the project as it is now: `~` is the home, None the working directory.

    Raises:
        ConfigError: The home that `~` stands for is not known.
    """
    root = directory.project_root
    if root is None:
        return Path.cwd()
    try:
        return root.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"directory.project_root={str(root)!r}: {error}; write the path without `~`"
        ) from None


def check_root(directory: DirectoryConfig) -> None:
    """Find out before training that no folder can be made where the run writes.

    Raises:
        ConfigError: A file is in the way.
    """
    base = project_root(directory).absolute() / directory.logdir_basename
    found = next((path for path in (base, *base.parents) if os.path.exists(path)), None)
    if found is not None and not found.is_dir():
        raise ConfigError(
            f"the run would write to {base}, but {found} is a file; name another folder in "
            "`directory.project_root`, or move the file away"
        )


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
        self._configured_id = self._id = run_id
        self._settled = False

    def is_of(self, directory: DirectoryConfig, run_id: str | None) -> bool:
        """Whether this run was made from these values; an id that was made since does not count."""
        return self._configured_id == run_id and self._directory == directory

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
        root = project_root(self._directory)
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
