"""Logs norms of gradients and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradient_norms import GradientNorms, measure_norms
from nshtrainer.runtime.gradients import GradientRequest, GradientStep
from nshtrainer.runtime.step_metrics import log_step_metrics

from .config import NormLoggingCallbackConfig

__all__ = ["NormLoggingCallback"]


class NormLoggingCallback(ConfiguredCallback[NormLoggingCallbackConfig]):
    """Logs norms through the gradient pipeline; see `NormLoggingCallbackConfig`.

    Totals are also in `trainer.callback_metrics`; norms of single parameters go to the loggers
    only. Nothing waits for the device before the batch ends.
    """

    config_class = NormLoggingCallbackConfig

    def __init__(self, config: NormLoggingCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._grad = _norm_type(self.config.log_grad_norm)
        self._grad_each = _norm_type(self.config.log_grad_norm_per_param)
        self._param = _norm_type(self.config.log_param_norm)
        self._param_each = _norm_type(self.config.log_param_norm_per_param)
        # Parameters are measured before the step, and logged with the gradients after it.
        self._param_norms: dict[int, GradientNorms] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._param_norms.clear()
            attach(trainer, self.state_key).gradients.register(
                self.state_key, request=self._request, observe=self._observe
            )

    def _request(self, step: GradientStep) -> GradientRequest | None:
        if not step.will_log:
            return None
        totals = _given(self._param, self._param_each)
        each = _given(self._param_each) if step.trainer.loggers else ()
        if totals or each:
            self._param_norms[id(step.optimizer)] = measure_norms(
                step.names,
                [parameter.detach() for parameter in step.parameters],
                totals=totals,
                per_parameter=each,
                finite=False,
                scale=None,
                device=step.parameters[0].device if step.parameters else torch.device("cpu"),
            )
        totals = _given(self._grad, self._grad_each)
        each = _given(self._grad_each) if step.trainer.loggers else ()
        if not totals and not each:
            return None
        return GradientRequest(totals=totals, per_parameter=each, clipped=self._grad is not None)

    def _observe(self, step: GradientStep) -> None:
        params = self._param_norms.pop(id(step.optimizer), None)
        if not step.will_log:
            return
        prefix = "train/"
        if len(step.trainer.optimizers) > 1:
            prefix += f"optimizer_{step.optimizer_index}/"
        totals: dict[str, Tensor] = {}
        single: dict[str, Tensor] = {}
        for kind, total, each, norms in (
            ("grad", self._grad, self._grad_each, step.norms),
            ("param", self._param, self._param_each, params),
        ):
            if norms is None:
                continue
            if total is not None:
                totals[f"{prefix}{kind}_norm"] = norms.totals[total]
            if each is not None:
                totals[f"{prefix}{kind}_{each}_norm_total"] = norms.totals[each]
                single |= _named(f"{prefix}{kind}_{each}_norm/", norms.per_parameter.get(each, {}))
        # Without clipping it is the very object that was measured before.
        if self._grad is not None and step.clipped is not None and step.clipped is not step.norms:
            totals[f"{prefix}grad_norm_clipped"] = step.clipped.totals[self._grad]
        log_step_metrics(step.trainer, totals | single, totals=totals)


def _norm_type(option: bool | float) -> float | None:
    """The p of an option of the config; None if it is off."""
    if option is False:
        return None
    return 2.0 if option is True else float(option)


def _given(*norm_types: float | None) -> tuple[float, ...]:
    return tuple({p for p in norm_types if p is not None})


def _named(prefix: str, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: norm for name, norm in norms.items()}
