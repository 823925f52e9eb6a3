"""Where a run writes: `{project_root}/nshtrainer_logs/{run id}/{log, checkpoint, ...}`."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nshtrainer.errors import ConfigError
from nshtrainer.files import atomic_write_text
from nshtrainer.run.identity import validate_run_id

__all__ = ["DEFAULT_BASENAME", "RunDirectory"]

log = logging.getLogger(__name__)

DEFAULT_BASENAME: Final = "nshtrainer_logs"
"""The directory, below the project's root, that holds one directory for each run."""

_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,200}")
_GITIGNORE = "# The files of training runs; made by nshtrainer.\n*\n"


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Asking for a path creates nothing; `ensure` does.

    Args:
        project_root: The directory of the project; taken as absolute from the current directory,
            so that a later `chdir` moves nothing.
        run_id: The run's id, one safe path component.
        basename: The directory of all runs below *project_root*.

    Raises:
        ConfigError: *run_id* or *basename* cannot name a directory.
    """

    project_root: Path
    run_id: str
    basename: str = DEFAULT_BASENAME

    def __post_init__(self) -> None:
        object.__setattr__(self, "project_root", Path(self.project_root).absolute())
        validate_run_id(self.run_id)
        _validate_name(self.basename, "the directory of all runs")

    @property
    def base(self) -> Path:
        """The directory of all runs of the project."""
        return self.project_root / self.basename

    @property
    def root(self) -> Path:
        """The directory of this run."""
        return self.base / self.run_id

    def subdirectory(self, name: str) -> Path:
        """Return the path of one kind of output, such as `"log"` or `"checkpoint"`.

        Raises:
            ConfigError: *name* is not a single path component.
        """
        return self.root / _validate_name(name, "a run's subdirectory")

    def ensure(self, name: str | None = None) -> Path:
        """Create the run's directory, or one of its subdirectories, and return it.

        Safe to call from several processes and again. The first call for a project also writes
        `.gitignore` beside the runs, so that git never offers to commit them; one that is there
        is left alone.

        Raises:
            OSError: The directory cannot be made.
        """
        path = self.root if name is None else self.subdirectory(name)
        path.mkdir(parents=True, exist_ok=True)
        ignore = self.base / ".gitignore"
        if not os.path.lexists(ignore):
            try:
                atomic_write_text(ignore, _GITIGNORE)
            except OSError as error:  # a convenience, no reason to fail a run
                log.warning("could not write %s: %s", ignore, error)
        return path


def _validate_name(name: str, what: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{what} cannot be named {name!r}; a single path component of 1 to 200 characters is "
            "expected. Choose a name without separators, and not '.' or '..'."
        )
    return name
