"""Writing a checkpoint straight to its temporary file, with its digest on the way; or later."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from .retry import retrying

if TYPE_CHECKING:
    from lightning.fabric.utilities.types import _PATH  # pyright: ignore[reportPrivateUsage] -- the type of an overridden method's argument
    from lightning.pytorch import Trainer

    from .snapshot import Snapshot

__all__ = ["StreamingCheckpointIO", "can_stream", "streaming"]


class StreamingCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to save, without its detours.

    Lightning holds the whole file in memory, and then writes it to the system's folder for
    temporary files, from where it is copied if that is another file system.

    A file that cannot be written raises in `finish`, not in `save_checkpoint`: only one rank writes,
    and the others would wait for it in the barrier that follows.

    Args:
        snapshot: Takes a copy, which `finish` writes, perhaps in another thread; None writes at
            once.
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._snapshot = snapshot
        self._held: tuple[dict[str, Any], Path] | None = None
        self._error: OSError | None = None
        self._known: tuple[int, str] | None = None

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # says why not
        if self._snapshot is not None:
            self._held = self._snapshot.take(checkpoint), Path(path)
            return
        try:
            self._write(checkpoint, Path(path))
        except OSError as error:
            self._error = error

    def finish(self) -> tuple[int, str] | None:
        """Return size in bytes and SHA-256 of the file; None if another plugin wrote it.

        Raises:
            OSError: It could not be written, after several tries; nothing of it is left.
        """
        if self._held is not None:
            held, self._held = self._held, None
            self._write(*held)
        if self._error is not None:
            raise self._error
        return self._known

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        self._known = retrying(lambda: _write(checkpoint, path), path.parent)


def _write(checkpoint: dict[str, Any], path: Path) -> tuple[int, str]:
    digesting: _Digesting | None = None
    try:
        with path.open("wb") as file:
            digesting = _Digesting(file)
            torch.save(checkpoint, digesting)  # pyright: ignore[reportArgumentType] -- all it needs of a file
        return digesting.size, digesting.sha256.hexdigest()
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if digesting is not None and digesting.error is not None and error is not digesting.error:
            raise digesting.error from None  # torch says only that its writer failed
        raise


class _Digesting:
    """A file to write to, from first to last byte."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def streaming(
    trainer: Trainer, snapshot: Snapshot | None = None
) -> Generator[StreamingCheckpointIO]:
    """Save in this way for a while, unless the user or the strategy has another one."""
    checkpoint_io = StreamingCheckpointIO(snapshot)
    before = trainer.strategy.checkpoint_io
    if not can_stream(trainer):
        yield checkpoint_io
        return
    trainer.strategy.checkpoint_io = checkpoint_io
    try:
        yield checkpoint_io
    finally:
        trainer.strategy.checkpoint_io = before


def can_stream(trainer: Trainer) -> bool:
    """Whether the trainer saves in Lightning's usual way, which ours stands in for."""
    return type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
