"""The `wandb` library: looked for when a trainer is made, imported when a run is opened."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from nshtrainer.errors import PluginLoadError, PluginNotInstalledError

__all__ = ["check_installed", "import_wandb"]


def check_installed() -> None:
    """Look for wandb without importing it.

    Raises:
        PluginNotInstalledError: It is not there; the message has the command that installs it.
    """
    if find_spec("wandb") is None:
        raise PluginNotInstalledError(
            "the logger 'wandb' needs the package wandb, which is not installed; run "
            "`pip install wandb`, or take the logger out of `loggers`"
        )


def import_wandb() -> ModuleType:
    """Return the module wandb.

    Raises:
        PluginLoadError: It cannot be imported; the message says why, and what to do.
    """
    try:
        return import_module("wandb")
    except Exception as error:
        raise PluginLoadError(
            f"wandb is installed but cannot be imported ({type(error).__name__}: {error}); run "
            "`pip install --upgrade wandb`, or take the logger 'wandb' out of `loggers`"
        ) from error
