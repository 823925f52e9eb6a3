"""The author's kit: what a callback, a logger or a plugin must keep, as tests to inherit.

Two lines test a callback:

    class TestMyCallback(CallbackConformance):
        config = MyCallbackConfig(threshold=0.5)

Importing this package imports neither torch nor Lightning nor pytest; its names are loaded on first
use. The clauses need pytest, which nshtrainer-core does not install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conformance import CallbackConformance
    from .logger_conformance import LoggerConformance
    from .models import TinyDataModule, TinyLoader, TinyModule, quiet_trainer_kwargs
    from .plugins import PluginEnvironment, plugin_environment
    from .promises import BrokenPromiseError
    from .syncs import HostSyncs
    from .traces import differences, facts

__all__ = [
    "BrokenPromiseError",
    "CallbackConformance",
    "HostSyncs",
    "LoggerConformance",
    "PluginEnvironment",
    "TinyDataModule",
    "TinyLoader",
    "TinyModule",
    "differences",
    "facts",
    "plugin_environment",
    "quiet_trainer_kwargs",
]

_MODULES = {
    "BrokenPromiseError": ".promises",
    "CallbackConformance": ".conformance",
    "HostSyncs": ".syncs",
    "LoggerConformance": ".logger_conformance",
    "PluginEnvironment": ".plugins",
    "TinyDataModule": ".models",
    "TinyLoader": ".models",
    "TinyModule": ".models",
    "differences": ".traces",
    "facts": ".traces",
    "plugin_environment": ".plugins",
    "quiet_trainer_kwargs": ".models",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
