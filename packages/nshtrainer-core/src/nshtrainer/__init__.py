"""Typed, serializable training runs for PyTorch Lightning; every callback is a plugin.

Importing this package reads the names that installed plugins provide and imports neither torch nor
Lightning; `Trainer`, `create_callbacks` and `resolve_callbacks` are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .callbacks.base import CallbackConfigBase, CallbackMetadataConfig, callback_registry
from .config import Config
from .directory import DirectoryConfig
from .errors import (
    ConfigError,
    ConfigFileError,
    DuplicateNameError,
    NshTrainerError,
    PluginContractError,
    PluginError,
    PluginLoadError,
    PluginNotInstalledError,
    PluginUnavailable,
)
from .loggers.base import LoggerConfigBase, logger_registry
from .metric import MetricConfig
from .plugins import PluginsConfig, hookimpl, manifest, plugin_manager, refresh_plugins
from .registry import Registry
from .trainer.config import TrainerConfig

if TYPE_CHECKING:
    from .callbacks.assembly import create_callbacks, resolve_callbacks
    from .callbacks.callback import ConfiguredCallback
    from .trainer.trainer import Trainer

    __version__: str

__all__ = [
    "CallbackConfigBase",
    "CallbackMetadataConfig",
    "Config",
    "ConfigError",
    "ConfigFileError",
    "ConfiguredCallback",
    "DirectoryConfig",
    "DuplicateNameError",
    "LoggerConfigBase",
    "MetricConfig",
    "NshTrainerError",
    "PluginContractError",
    "PluginError",
    "PluginLoadError",
    "PluginNotInstalledError",
    "PluginUnavailable",
    "PluginsConfig",
    "Registry",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "callback_registry",
    "create_callbacks",
    "hookimpl",
    "logger_registry",
    "manifest",
    "plugin_manager",
    "refresh_plugins",
    "resolve_callbacks",
]

_LAZY = {
    "ConfiguredCallback": ".callbacks.callback",
    "Trainer": ".trainer.trainer",
    "create_callbacks": ".callbacks.assembly",
    "resolve_callbacks": ".callbacks.assembly",
}

manifest()  # the one scan of this process


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    if name == "__version__":
        import importlib_metadata

        return importlib_metadata.version("nshtrainer-core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
