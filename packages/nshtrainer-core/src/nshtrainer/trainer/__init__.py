"""The run: its configuration and the trainer that is made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import TrainerConfig

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["Trainer", "TrainerConfig"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # imports torch and Lightning
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
