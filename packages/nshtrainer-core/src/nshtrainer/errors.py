"""The exception tree: every deliberate error is an `NshTrainerError` and the builtin that fits.

NshTrainerError
|-- ConfigError (ValueError)                 a configuration that cannot be used
|   `-- ConfigFileError                      ... read from a file; names file, line and field
`-- PluginError                              a plugin that cannot be used
    |-- PluginNotInstalledError (ModuleNotFoundError)
    |-- PluginLoadError (ImportError)        installed, but broken, disabled, unavailable, incompatible
    |-- DuplicateNameError (TypeError)       one name, two classes
    |-- PluginContractError (TypeError)      a hook or config class that breaks the contract
    `-- PluginUnavailable (RuntimeError)     raised *by* a plugin: installed, not usable here
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ConfigFileError",
    "DuplicateNameError",
    "NshTrainerError",
    "PluginContractError",
    "PluginError",
    "PluginLoadError",
    "PluginNotInstalledError",
    "PluginUnavailable",
]


class NshTrainerError(Exception):
    """Base of every error that nshtrainer raises on purpose."""


class ConfigError(NshTrainerError, ValueError):
    """A configuration cannot be used; the message says what, where and what to do."""


class ConfigFileError(ConfigError):
    """A configuration file cannot be read, or what it says is not a valid configuration."""


class PluginError(NshTrainerError):
    """A plugin, or a name that a plugin should provide, cannot be used."""


class PluginNotInstalledError(PluginError, ModuleNotFoundError):
    """A known name belongs to a distribution that is not installed; the message has the command."""


class PluginLoadError(PluginError, ImportError):
    """An installed plugin cannot be used: it is broken, disabled, unavailable or incompatible."""


class DuplicateNameError(PluginError, TypeError):
    """Two classes claim one name."""


class PluginContractError(PluginError, TypeError):
    """A config class or hook implementation does not follow the contract."""


class PluginUnavailable(PluginError, RuntimeError):  # noqa: N818 -- a state that plugins announce, not a fault
    """Raise this in a plugin's module when it is installed but of no use here (say, without a GPU)."""
