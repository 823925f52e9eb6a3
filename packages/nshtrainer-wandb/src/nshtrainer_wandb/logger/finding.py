"""The W&B logger of a trainer, for the callbacks that need one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import WandbLogger

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["find_wandb_logger"]

log = logging.getLogger(__name__)


def find_wandb_logger(trainer: Trainer, missed: str | None = None) -> WandbLogger | None:
    """Return the first W&B logger of *trainer*, Lightning's own included; None without one.

    Args:
        trainer: Ours or a plain one.
        missed: What goes undone without a logger, for a warning on rank zero: `the callback
            'wandb_watch' records nothing`; None for no warning.
    """
    logger = next((item for item in trainer.loggers if isinstance(item, WandbLogger)), None)
    if logger is None and missed is not None and trainer.is_global_zero:
        log.warning("%s: the trainer has no W&B logger; add one, or remove the callback", missed)
    return logger
