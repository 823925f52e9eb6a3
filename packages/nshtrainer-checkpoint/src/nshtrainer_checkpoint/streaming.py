"""Writing a checkpoint straight to its temporary file, with its digest on the way."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

if TYPE_CHECKING:
    from lightning.fabric.utilities.types import _PATH  # pyright: ignore[reportPrivateUsage] -- the type of an overridden method's argument
    from lightning.pytorch import Trainer

__all__ = ["StreamingCheckpointIO", "streaming"]


class StreamingCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to save, without its detours.

    Lightning holds the whole file in memory, and then writes it to the system's folder for
    temporary files, from where it is copied if that is another file system.
    """

    def __init__(self) -> None:
        self.digests: dict[Path, tuple[int, str]] = {}
        """Size in bytes and SHA-256 of what was written."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # says why not
        with Path(path).open("wb") as file:
            digest = _Digesting(file)
            torch.save(checkpoint, digest)  # pyright: ignore[reportArgumentType] -- all it needs of a file
        self.digests[Path(path)] = digest.size, digest.sha256.hexdigest()


class _Digesting:
    """A file to write to, from first to last byte."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def streaming(trainer: Trainer) -> Generator[StreamingCheckpointIO]:
    """Save in this way for a while, unless the user or the strategy has another one."""
    checkpoint_io = StreamingCheckpointIO()
    before = trainer.strategy.checkpoint_io
    if type(before) is not TorchCheckpointIO:
        yield checkpoint_io
        return
    trainer.strategy.checkpoint_io = checkpoint_io
    try:
        yield checkpoint_io
    finally:
        trainer.strategy.checkpoint_io = before
