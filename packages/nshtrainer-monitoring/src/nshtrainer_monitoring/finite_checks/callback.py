"""Looks for NaN, Inf and missing gradients."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientRequest, GradientStep, StepOutcome

from .config import FiniteChecksCallbackConfig
from .errors import MissingGradientError, NonFiniteGradientError
from .findings import SCALER_PATIENCE, NonFiniteRecord, Throttle, shorten

__all__ = ["FiniteChecksCallback"]

log = logging.getLogger(__name__)

_NORM_TYPE = 2.0  # the one that gradient skipping and norm logging measure, so it costs no pass


class FiniteChecksCallback(ConfiguredCallback[FiniteChecksCallbackConfig]):
    """Checks gradients once per optimizer step; see `FiniteChecksCallbackConfig`.

    Raises:
        NonFiniteGradientError: In `fit`, before the step, if `nonfinite_grads` is `raise`.
        MissingGradientError: In `fit`, before the step, if `none_grads` is `raise`.
    """

    config_class = FiniteChecksCallbackConfig

    def __init__(self, config: FiniteChecksCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()
        if stage != "fit":
            return
        action = self.config.nonfinite_grads
        if action != "ignore" or self.config.none_grads != "ignore":
            attach(trainer, self.state_key).gradients.register(
                self.state_key,
                request=self._request,
                decide=self._raise_if_non_finite if action == "raise" else None,
                outcome=self._record if action == "warn" else None,
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_all(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            self._report_all(trainer)
        except Exception:  # a device that is gone must not hide why
            log.debug("findings could not be read from the device", exc_info=True)
        self._forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        self._records: dict[int, NonFiniteRecord] = {}
        self._streaks: dict[int, int] = {}
        self._throttle = Throttle()
        self._total = 0
        self._without_grad: set[str] = set()

    def _request(self, step: GradientStep) -> GradientRequest | None:
        if self.config.none_grads != "ignore":
            self._check_missing(step)
        if self.config.nonfinite_grads == "ignore":
            return None
        each = (_NORM_TYPE,) if self.config.nonfinite_grads == "warn" else ()
        return GradientRequest(finite=True, per_parameter=each)

    def _check_missing(self, step: GradientStep) -> None:
        missing = [
            name
            for name, parameter in zip(step.names, step.parameters, strict=True)
            if parameter.grad is None and parameter.requires_grad
        ]
        if not missing:
            return
        if self.config.none_grads == "raise":
            raise MissingGradientError(
                f"{len(missing)} of {len(step.names)} parameters have no gradient at optimizer "
                f"step {step.step}: {shorten(missing)}. Every trainable parameter of an optimizer "
                "has to take part in the loss. Use them, freeze them (requires_grad=False), or "
                'set finite_checks.none_grads to "warn" or "ignore".'
            )
        if new := [name for name in missing if name not in self._without_grad]:
            self._without_grad.update(new)
            log.warning(
                "%d parameters have no gradient at optimizer step %d, and are not trained by it: "
                '%s. Use or freeze them, or set finite_checks.none_grads to "ignore".',
                len(new),
                step.step,
                shorten(new),
            )

    def _raise_if_non_finite(self, step: GradientStep) -> StepOutcome | None:
        norms = step.norms
        if norms is None or norms.finite is None:
            return None
        key = id(step.optimizer)
        if bool(norms.finite):
            self._streaks[key] = 0
            return None
        names = step.non_finite_parameters()
        if not names:  # the norm overflowed, the gradients did not
            return None
        self._streaks[key] = self._streaks.get(key, 0) + 1
        if _has_scaler(step.trainer) and self._streaks[key] < SCALER_PATIENCE:
            log.debug("the GradScaler is searching its scale at step %d", step.step)
            return None
        raise NonFiniteGradientError(
            f"{len(names)} of {len(step.names)} parameters have a NaN or Inf gradient at optimizer "
            f"step {step.step}: {shorten(names)}. Gradients have to be finite; the weights are "
            "those before the step. Look at this batch and the learning rate, skip such steps "
            "(gradient_skipping with skip_non_finite), or set finite_checks.nonfinite_grads to "
            '"warn".'
        )

    def _record(self, step: GradientStep, skipped: bool | Tensor) -> None:
        record = self._records.setdefault(id(step.optimizer), NonFiniteRecord())
        record.add(step, _NORM_TYPE)
        if step.will_log:
            self._report(step.trainer, record)

    def _report_all(self, trainer: Trainer) -> None:
        for record in self._records.values():
            self._report(trainer, record)

    def _report(self, trainer: Trainer, record: NonFiniteRecord) -> None:
        report = record.take()
        if report is None:
            return
        if _has_scaler(trainer) and report.longest < SCALER_PATIENCE:
            log.debug("%d steps were non-finite for the GradScaler", report.count)
            return
        self._total += report.count
        if not self._throttle.allows():
            return
        log.warning(
            "%d optimizer steps had NaN or Inf gradients (%d in this run), the first one at step "
            '%d, in %s. Set finite_checks.nonfinite_grads to "raise" to stop there.',
            report.count,
            self._total,
            report.first_step,
            shorten(report.names),
        )


def _has_scaler(trainer: Trainer) -> bool:
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())
