"""Plugins: found by entry points, loaded on use, kept apart from one another's failures."""

from __future__ import annotations

from .hooks import hookimpl, plugin_manager
from .manifest import Entry, Manifest, manifest, refresh_plugins
from .policy import PluginsConfig
from .state import PluginState

__all__ = [
    "Entry",
    "Manifest",
    "PluginState",
    "PluginsConfig",
    "hookimpl",
    "manifest",
    "plugin_manager",
    "refresh_plugins",
]
