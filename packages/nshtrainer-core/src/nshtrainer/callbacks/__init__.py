"""Callbacks: their configurations, their registry, and the way from one to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import CallbackConfigBase, CallbackMetadataConfig, callback_registry

if TYPE_CHECKING:
    from .callback import ConfiguredCallback

__all__ = [
    "CallbackConfigBase",
    "CallbackMetadataConfig",
    "ConfiguredCallback",
    "callback_registry",
]


def __getattr__(name: str) -> Any:
    if name == "ConfiguredCallback":  # imports Lightning
        from .callback import ConfiguredCallback

        return ConfiguredCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
