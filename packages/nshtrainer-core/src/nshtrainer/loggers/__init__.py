"""Logger configurations and their registry."""

from __future__ import annotations

from .base import LoggerConfigBase, logger_registry

__all__ = ["LoggerConfigBase", "logger_registry"]
