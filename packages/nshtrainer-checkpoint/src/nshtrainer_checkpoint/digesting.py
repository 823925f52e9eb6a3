"""A file that is hashed, and sent to the disk, while it is being written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import Self

__all__ = ["DigestingFile", "lasting_memory"]

_LARGE = 1 << 16
"""Bytes from which on a thread is worth while."""

_PIECE = 4 << 20
"""Bytes after which the system is told to send what it has to the disk."""

_FADVISE_IS_THERE = hasattr(os, "posix_fadvise")


class DigestingFile:
    """What `torch.save` needs of a file; written from first to last byte.

    SHA-256 runs in a thread of its own, since it takes as long as writing does. What may be gone
    after `write` returns is waited for; *lasting* memory is read later, without a copy. Leave the
    block before you read `sha256`.

    Args:
        file: Buffered, opened for writing; stays open.
        lasting: Address -> bytes there that neither move nor change inside the block.
    """

    def __init__(self, file: IO[bytes], lasting: Mapping[int, int]) -> None:
        self._file, self._lasting = file, lasting
        self._digest = hashlib.sha256()
        self._queue: SimpleQueue[memoryview | bytes | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._small = bytearray()
        self._sent = 0
        self._is_given_up = False
        self.size = 0
        self.error: OSError | None = None
        """What writing raised; torch says only that its writer failed."""

    @property
    def sha256(self) -> str:
        """Of all that was written, as hexadecimal text."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        self._is_given_up = kind is not None
        self._hash_small()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def write(self, data: memoryview | bytes) -> int:
        """Write *data* and hash it, at the same time.

        Raises:
            OSError: It could not be written; `error` keeps it.
        """
        done = self._hash(data)
        try:
            self._write(memoryview(data))
        except OSError as error:
            self.error = error
            raise
        finally:
            if done is not None:
                done.wait()
        return len(data)

    def flush(self) -> None:
        """Give the system what the file's buffer holds."""
        self._file.flush()

    # ---- the file ---------------------------------------------------------------------------

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._file.write(piece)
            self.size += len(piece)
            if self.size - self._sent >= _PIECE:
                self._send()

    def _send(self) -> None:
        """Let the disk begin, so that little is left to wait for at the end.

        The advice that pages are not needed makes Linux write them out; those it has not written
        yet, which are all, stay in its cache.
        """
        if _FADVISE_IS_THERE:
            self._file.flush()
            with contextlib.suppress(OSError):  # it is only advice
                os.posix_fadvise(
                    self._file.fileno(), self._sent, self.size - self._sent, os.POSIX_FADV_DONTNEED
                )
        self._sent = self.size

    # ---- the digest -------------------------------------------------------------------------

    def _hash(self, data: memoryview | bytes) -> threading.Event | None:
        """Take *data* into the digest; returns what to wait for before it may go."""
        if len(data) < _LARGE:
            self._small += data
            if len(self._small) >= _LARGE:
                self._hash_small()
            return None
        self._hash_small()
        if self._thread is None:
            thread = threading.Thread(
                target=self._run, name="nshtrainer-checkpoint-digest", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the interpreter is ending, and waits for this save
                self._digest.update(data)
                return None
            self._thread = thread
        self._queue.put(data)
        if self._lasting.get(_address(data), 0) >= len(data):
            return None
        done = threading.Event()
        self._queue.put(done)
        return done

    def _hash_small(self) -> None:
        small, self._small = bytes(self._small), bytearray()
        if self._thread is None:
            self._digest.update(small)
        else:
            self._queue.put(small)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif not self._is_given_up:
                self._digest.update(item)


def lasting_memory(value: Any) -> dict[int, int]:
    """Return address and size in bytes of the CPU memory behind the tensors in nested *value*."""
    found: dict[int, int] = {}
    left, seen = [value], set[int]()
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            if type(one) in (Tensor, Parameter) and one.layout is torch.strided:
                storage = one.untyped_storage()
                if storage.device.type == "cpu":
                    found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, (dict, list, tuple)) and id(cast("object", one)) not in seen:
            seen.add(id(cast("object", one)))  # a container may contain itself
            if isinstance(one, dict):
                left += cast("dict[Any, Any]", one).values()
            else:
                left += cast("list[Any]", one)
    return found


def _address(data: memoryview | bytes) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data
