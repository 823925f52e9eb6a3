"""Warnings about what was found since the last ones, at the steps at which metrics are logged."""

from __future__ import annotations

import logging

from lightning.pytorch import Trainer

from nshtrainer.runtime.gradients import GradientStep

from .config import FiniteChecksCallbackConfig
from .findings import (
    SCALER_PATIENCE,
    LossRecord,
    NonFiniteRecord,
    Throttle,
    has_scaler,
    shorten,
)

__all__ = ["Reports"]

log = logging.getLogger(__name__)

_REPORTED = frozenset({"warn", "skip"})  # the others end the run


class Reports:
    """What was found, kept on the device; said the 1st, 2nd, 4th, 8th ... time.

    Args:
        config: Which findings are reported.
    """

    def __init__(self, config: FiniteChecksCallbackConfig) -> None:
        self._config = config
        self.losses = LossRecord()
        self._gradients: dict[int, NonFiniteRecord] = {}
        self._loss_throttle, self._gradient_throttle = Throttle(), Throttle()
        self._num_losses = self._num_steps = 0

    def add(self, step: GradientStep) -> None:
        """Record the gradients of a step that is over; no host synchronization."""
        if self._config.nonfinite_grads in _REPORTED:
            record = self._gradients.setdefault(id(step.optimizer), NonFiniteRecord())
            record.add(step)

    def send(self, trainer: Trainer) -> None:
        """Warn of what was recorded since the last time; waits for the device."""
        if self._config.nonfinite_loss in _REPORTED:
            self._send_losses()
        for record in self._gradients.values():
            self._send_gradients(trainer, record)

    def _send_losses(self) -> None:
        report = self.losses.take()
        if report is None:
            return
        count, first_step = report
        self._num_losses += count
        if not self._loss_throttle.allows():
            return
        log.warning(
            "the loss of %d batches was NaN or Inf (%d in this run), the first one at optimizer "
            'step %d%s. Set finite_checks.nonfinite_loss to "raise" to stop there.',
            count,
            self._num_losses,
            first_step,
            _consequence(self._config.nonfinite_loss),
        )

    def _send_gradients(self, trainer: Trainer, record: NonFiniteRecord) -> None:
        report = record.take()
        if report is None:
            return
        if has_scaler(trainer) and report.longest < SCALER_PATIENCE:
            log.debug("%d steps were non-finite for the GradScaler", report.count)
            return
        self._num_steps += report.count
        if not self._gradient_throttle.allows():
            return
        log.warning(
            "%d optimizer steps had NaN or Inf gradients (%d in this run), the first one at step "
            '%d, in %s%s. Set finite_checks.nonfinite_grads to "raise" to stop there.',
            report.count,
            self._num_steps,
            report.first_step,
            shorten(report.names),
            _consequence(self._config.nonfinite_grads),
        )


def _consequence(action: str) -> str:
    return "; these steps were skipped" if action == "skip" else ""
