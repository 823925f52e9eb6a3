"""Trying again what a full disk or a hiccup of a network file system made fail."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["WAITS", "retrying"]

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0)
"""Seconds to wait before the second, third and fourth try."""

_PASSING = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.EBUSY,
        errno.ETIMEDOUT,
    }
)  # fmt: skip


def retrying(action: Callable[[], T], what: object, waits: Sequence[float] = WAITS) -> T:
    """Call *action*; where it fails for a cause that may pass, wait and call it again.

    Args:
        action: Leaves nothing behind when it fails.
        what: Named in the log.
        waits: Seconds before each further try.

    Raises:
        OSError: The last try's error, or at once one that waiting does not mend.
    """
    for wait in waits:
        try:
            return action()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            log.warning("%s could not be written (%s); trying again in %s s", what, error, wait)
            time.sleep(wait)
    return action()
