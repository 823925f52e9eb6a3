"""Checkpoints held for W&B by hard links, so that it reads them whatever becomes of the originals."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wandb import Artifact, Run

__all__ = ["add_checkpoint", "clear_staged", "staging_of"]

_NAME = "model.ckpt"  # as Lightning's logger names it within the artifact


def add_checkpoint(artifact: Artifact, path: Path, staged: Path) -> None:
    """Add the checkpoint *path*, a file, a directory or one in a store, to *artifact*.

    Args:
        artifact: Not logged yet.
        path: What is in a store (a `UPath`) is referred to by its URL; W&B does not copy it.
        staged: A path that does not exist, on the file system of *path*: W&B reads from here. It
            costs no space until *path* is deleted. Where links cannot be made, W&B makes a copy.

    Reads everything: W&B names content by its MD5.

    Raises:
        OSError: It cannot be read.
        ValueError: There is no such checkpoint.
    """
    if not isinstance(path, Path):  # pyright: ignore[reportUnnecessaryIsInstance] -- a UPath passes for one
        artifact.add_reference(str(path), name=_NAME, checksum=False)
        return
    source, policy = path, "mutable"
    with contextlib.suppress(OSError):
        _link(path, staged)
        source, policy = staged, "immutable"
    if source.is_dir():
        artifact.add_dir(os.fspath(source), policy=policy, skip_cache=True)
    else:
        artifact.add_file(os.fspath(source), name=_NAME, policy=policy, skip_cache=True)


def staging_of(run: Run) -> Path:
    """Return the folder for links, beside the files of *run*; it may not exist."""
    return Path(run.dir).parent / "checkpoints"


def clear_staged(run: Run) -> None:
    """Remove the links of *run*, which has been finished; an offline one still needs them to sync."""
    if not run.offline:
        shutil.rmtree(staging_of(run), ignore_errors=True)


def _link(path: Path, staged: Path) -> None:
    staged.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, staged, copy_function=os.link)
    else:
        os.link(os.path.realpath(path), staged)
