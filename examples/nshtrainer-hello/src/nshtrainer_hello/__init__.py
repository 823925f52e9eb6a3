"""Says hello when training starts; an example of a plugin for nshtrainer."""

from __future__ import annotations

from .config import HelloCallbackConfig

__all__ = ["HelloCallbackConfig"]
