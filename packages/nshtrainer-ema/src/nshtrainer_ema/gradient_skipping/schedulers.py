"""Holding learning rate schedules for one step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["SchedulerHold", "schedulers_by_step"]


def schedulers_by_step(trainer: Trainer) -> list[Any]:
    """The trainer's schedules (`LRSchedulerConfig`) that advance with steps and no metric."""
    return [
        config
        for config in trainer.lr_scheduler_configs
        if config.interval == "step" and not config.reduce_on_plateau
    ]


class SchedulerHold:
    """Keeps Lightning from advancing schedules between an optimizer step and the end of its batch.

    Lightning advances a schedule at every `frequency`-th batch, and reads that number each time; a
    frequency that no batch reaches holds it. Neither schedule nor module is touched.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Any, int]] = []

    def hold(self, trainer: Trainer) -> None:
        """Hold until `release`; again is as once."""
        if not self._held:
            self._held = [(config, config.frequency) for config in schedulers_by_step(trainer)]
            for config, _ in self._held:
                config.frequency = sys.maxsize

    def release(self) -> None:
        """Let the schedules go on; nothing happens if none is held."""
        for config, frequency in self._held:
            config.frequency = frequency
        self._held = []
