"""`DirectoryConfig`: where runs write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

from .config import Config

__all__ = ["DirectoryConfig"]


class DirectoryConfig(Config):
    """A run writes below `<project_root>/<logdir_basename>/<run id>`, made at the first write."""

    project_root: Path | None = None
    """Folder of the project; None is the working directory when the run starts. Made if missing."""

    logdir_basename: Annotated[str, StringConstraints(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")] = (
        "nshtrainer_logs"
    )
    """Name of the folder below the project root that holds all runs."""
