"""Metrics that are logged outside of a training batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer

__all__ = ["log_at_once", "log_in_hook"]


def log_in_hook(pl_module: LightningModule, metrics: Mapping[str, float]) -> None:
    """Log *metrics* from a hook in which Lightning allows it, together with the module's own.

    With several ranks the largest value is logged, on all of them; a small collective.
    """
    for name, value in metrics.items():
        pl_module.log(
            name,
            torch.tensor(value, dtype=torch.float32, device=pl_module.device),
            on_step=False,
            on_epoch=True,
            reduce_fx="max",
            sync_dist=True,
            batch_size=1,
        )


def log_at_once(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send *metrics* to the loggers now and put them into `callback_metrics`.

    The x-axis is Lightning's own: the batches that stepped so far.
    """
    if not metrics:
        return
    trainer.callback_metrics.update({k: torch.tensor(float(v)) for k, v in metrics.items()})
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage] -- Lightning's x-axis has no public form
    for logger in trainer.loggers:
        logger.log_metrics(metrics=dict(metrics), step=step)
