"""Weights & Biases for nshtrainer: logger, watch, uploads; and activations with nshutils.

The configurations cost neither torch nor wandb; the rest is imported when it is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .act_save.config import ActSaveConfig
from .checkpoints.config import WandbCheckpointsCallbackConfig
from .logger.config import WandbLoggerConfig
from .upload_code.config import WandbUploadCodeCallbackConfig
from .watch.config import WandbWatchCallbackConfig

if TYPE_CHECKING:
    from .act_save.callback import ActSaveCallback
    from .checkpoints.callback import WandbCheckpointsCallback
    from .logger.logger import LateWandbLogger
    from .upload_code.callback import WandbUploadCodeCallback
    from .watch.callback import WandbWatchCallback

__all__ = [
    "ActSaveCallback",
    "ActSaveConfig",
    "LateWandbLogger",
    "WandbCheckpointsCallback",
    "WandbCheckpointsCallbackConfig",
    "WandbLoggerConfig",
    "WandbUploadCodeCallback",
    "WandbUploadCodeCallbackConfig",
    "WandbWatchCallback",
    "WandbWatchCallbackConfig",
]

_RUN_TIME = {
    "ActSaveCallback": ".act_save.callback",
    "LateWandbLogger": ".logger.logger",
    "WandbCheckpointsCallback": ".checkpoints.callback",
    "WandbUploadCodeCallback": ".upload_code.callback",
    "WandbWatchCallback": ".watch.callback",
}


def __getattr__(name: str) -> Any:
    if name in _RUN_TIME:
        return getattr(import_module(_RUN_TIME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
