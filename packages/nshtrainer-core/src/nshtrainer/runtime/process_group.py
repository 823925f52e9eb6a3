"""The end of a distributed process: its process group is closed while Python is still whole."""

from __future__ import annotations

import atexit
import functools

__all__ = ["close_at_exit"]


def close_at_exit() -> None:
    """Have the process group that this process is in destroyed when the process ends.

    gloo's threads that are still alive while Python shuts down abort the process now and then
    (PyTorch issue 190489: "terminate called without an active exception"), so that a run which has
    finished seems to have failed. Lightning closes NCCL's groups only. Does nothing outside a
    distributed run, and no more at a second call.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        _register()


@functools.cache
def _register() -> None:
    atexit.register(_close)


def _close() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
