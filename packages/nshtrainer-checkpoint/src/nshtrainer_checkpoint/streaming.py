"""Writing a checkpoint straight to its temporary file, with its digest on the way; or later."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from .digesting import DigestingFile, lasting_memory
from .retry import retrying
from .storage import explaining

if TYPE_CHECKING:
    from lightning.fabric.utilities.types import _PATH  # pyright: ignore[reportPrivateUsage] -- the type of an overridden method's argument
    from lightning.pytorch import Trainer

    from .snapshot import Snapshot

__all__ = ["StreamingCheckpointIO", "can_stream", "streaming"]

_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
"""How some file systems answer who wants a file on disk; `put_in_place` says so in the log."""


class StreamingCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to save, without its detours.

    Lightning holds the whole file in memory, and then writes it to the system's folder for
    temporary files, from where it is copied if that is another file system.

    A file that cannot be written raises in `finish`, not in `save_checkpoint`: only one rank writes,
    and the others would wait for it in the barrier that follows.

    Args:
        snapshot: Takes a copy, which `finish` writes, perhaps in another thread; None writes at
            once.
        parameters: Names in the `state_dict` that are looked at for NaN and infinity; buffers may
            hold them for good reason.
    """

    def __init__(self, snapshot: Snapshot | None = None, parameters: Collection[str] = ()) -> None:
        self._snapshot, self._parameters = snapshot, parameters
        self.weights_finite: bool | None = None
        """Whether no parameter that was written holds NaN or infinity; None if that is not known."""
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
        def meanwhile() -> None:
            self.weights_finite = _all_finite(checkpoint.get("state_dict"), self._parameters)

        with explaining(path.parent):
            self._known = retrying(lambda: _write(checkpoint, path, meanwhile), path.parent)


def _write(
    checkpoint: dict[str, Any], path: Path, meanwhile: Callable[[], None]
) -> tuple[int, str]:
    digesting: DigestingFile | None = None
    try:
        with path.open("wb") as file, DigestingFile(file, lasting_memory(checkpoint)) as digesting:
            torch.save(checkpoint, digesting)  # pyright: ignore[reportArgumentType] -- all it needs of a file
            file.flush()
            _sync_during(file.fileno(), meanwhile)  # and the digest is completed
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if digesting is not None and digesting.error is not None and error is not digesting.error:
            raise digesting.error from None  # torch says only that its writer failed
        raise
    return digesting.size, digesting.sha256


def _all_finite(state_dict: Any, parameters: Collection[str]) -> bool | None:
    """Whether the *parameters* hold no NaN and no infinity: a sum that is finite says so fast."""
    if not isinstance(state_dict, dict):
        return None
    named = cast("dict[Any, Any]", state_dict)
    found = [t for name, t in named.items() if name in parameters and isinstance(t, torch.Tensor)]
    floating = [t.detach() for t in found if t.is_floating_point() and t.numel()]
    if not floating:
        return None
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in floating:
        by_device.setdefault(tensor.device, []).append(tensor.sum(dtype=torch.float32))
    if all(torch.stack(sums).isfinite().all() for sums in by_device.values()):
        return True
    return all(bool(t.isfinite().all()) for t in floating)  # the sum itself may have overflowed


def _sync_during(descriptor: int, work: Callable[[], None]) -> None:
    """Do *work* while the disk is busy; both are over when this returns or raises."""
    failed: list[OSError] = []

    def sync() -> None:
        try:
            _sync(descriptor)
        except OSError as error:
            failed.append(error)

    # No executor: those take no work any more while the interpreter waits for the last save.
    thread = threading.Thread(target=sync, name="nshtrainer-checkpoint-flush")
    try:
        thread.start()
    except RuntimeError:  # from Python 3.12 on no thread starts then
        sync()
        work()
    else:
        try:
            work()
        finally:
            thread.join()
    if failed:
        raise failed[0]


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


@contextlib.contextmanager
def streaming(
    trainer: Trainer, snapshot: Snapshot | None = None
) -> Generator[StreamingCheckpointIO]:
    """Save in this way for a while, unless the user or the strategy has another one."""
    module = trainer.lightning_module
    checkpoint_io = StreamingCheckpointIO(snapshot, {name for name, _ in module.named_parameters()})
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
