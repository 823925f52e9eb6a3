"""`DirectoryConfig`: where runs write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from .config import Config

__all__ = ["DirectoryConfig"]


def _folder_name(value: str) -> str:
    if not value.strip(". ") or any(c in value for c in "/\\\0"):
        raise PydanticCustomError(
            "folder_name",
            "the name of one folder is expected, not {value}; choose the folder around it with "
            "`project_root`",
            {"value": repr(value)},
        )
    return value


def _root(value: Path | None) -> Path | None:
    if value is not None and "\0" in str(value):
        raise PydanticCustomError(
            "project_root", "{value} names no folder: it holds a NUL", {"value": repr(str(value))}
        )
    return value


class DirectoryConfig(Config):
    """A run writes below `<project_root>/<logdir_basename>/<run id>`, made at the first write."""

    project_root: Annotated[Path | None, AfterValidator(_root)] = None
    """Folder of the project; None is the working directory when the run starts. Made if missing; `~` is
    the user's home."""

    logdir_basename: Annotated[str, AfterValidator(_folder_name)] = "nshtrainer_logs"
    """Name of the folder below the project root that holds all runs."""
