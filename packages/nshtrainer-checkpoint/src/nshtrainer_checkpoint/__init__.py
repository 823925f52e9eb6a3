"""Checkpoints that lose nothing: the best, the last, and one on an exception.

Importing this reads configurations only; callbacks, and with them Lightning, load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import (
    BestCheckpointCallbackConfig,
    CheckpointSavingConfig,
    LastCheckpointCallbackConfig,
    OnExceptionCheckpointCallbackConfig,
)

if TYPE_CHECKING:
    from .callback import BestCheckpointCallback, LastCheckpointCallback
    from .on_exception import OnExceptionCheckpointCallback

__all__ = [
    "BestCheckpointCallback",
    "BestCheckpointCallbackConfig",
    "CheckpointSavingConfig",
    "LastCheckpointCallback",
    "LastCheckpointCallbackConfig",
    "OnExceptionCheckpointCallback",
    "OnExceptionCheckpointCallbackConfig",
]

_LAZY = {
    "BestCheckpointCallback": ".callback",
    "LastCheckpointCallback": ".callback",
    "OnExceptionCheckpointCallback": ".on_exception",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
