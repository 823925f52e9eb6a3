"""Logs norms of gradients, parameters, updates and moments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradient_norms import (
    GradientNorms,
    TensorGroup,
    measure_groups,
    measure_norms,
)
from nshtrainer.runtime.gradients import GradientRequest, GradientStep
from nshtrainer.runtime.optimizer_hooks import plain_name
from nshtrainer.runtime.step_metrics import log_step_metrics
from nshtrainer.selection import NameSelection

from .config import NormLoggingCallbackConfig
from .modules import ModuleNorms
from .updates import change_in_place, copies, moments, ratio, ratios
from .wanted import Wanted, single_norms, total_norms

__all__ = ["NormLoggingCallback"]

log = logging.getLogger(__name__)

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


@dataclass
class _Before:
    """What was seen of one optimizer's parameters before its step."""

    params: GradientNorms | None
    weights: list[Tensor] | None


@dataclass
class _Metrics:
    """The metrics of one step, without prefix and label."""

    totals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    singles: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class NormLoggingCallback(ConfiguredCallback[NormLoggingCallbackConfig]):
    """Logs norms through the gradient pipeline; see `NormLoggingCallbackConfig`.

    Totals are also in `trainer.callback_metrics`; norms of single parameters and modules go to the
    loggers only. Nothing waits for the device before the batch ends.

    Raises:
        ConfigError: Before training, if a glob of `include` or `exclude` matches no parameter.
    """

    config_class = NormLoggingCallbackConfig

    def __init__(self, config: NormLoggingCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._grad = Wanted.of(self.config, "log_grad_norm")
        self._param = Wanted.of(self.config, "log_param_norm")
        self._update = Wanted.of(self.config, "log_update_norm")
        self._ratio = Wanted.of(self.config, "log_update_ratio")
        self._moment = Wanted.of(self.config, "log_moment_norm")
        self._selection = NameSelection(
            self.config.include, self.config.exclude, owner="norm_logging"
        )
        self._suffix = f"/{self.config.label}" if self.config.label else ""
        self._forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()
            attach(trainer, self.state_key).gradients.register(
                self.state_key, request=self._request, observe=self._observe
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._selection.check([plain_name(name) for name, _ in pl_module.named_parameters()])

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        self._before: dict[int, _Before] = {}
        self._modules = ModuleNorms(self.config.module_depth)
        self._no_moments = False

    def _request(self, step: GradientStep) -> GradientRequest | None:
        if not step.will_log:
            return None
        key = id(step.optimizer)
        # An LBFGS asks again at every evaluation, when the weights have moved already.
        if key not in self._before and (self._param or self._update or self._ratio):
            self._before[key] = self._look_before(step)
        totals = total_norms(self._grad)
        each = self._singles(step, self._grad)
        if not totals and not each:
            return None
        return GradientRequest(
            totals=totals, per_parameter=each, clipped=self._grad.total is not None
        )

    def _look_before(self, step: GradientStep) -> _Before:
        params = None
        if self._asks(step, self._param, self._ratio):
            params = measure_norms(
                step.names,
                [parameter.detach() for parameter in step.parameters],
                totals=total_norms(self._param, self._ratio),
                per_parameter=self._singles(step, self._param, self._ratio),
                finite=False,
                scale=None,
                device=_home(step),
            )
        changes = self._asks(step, self._update, self._ratio)
        return _Before(params, copies(step.parameters) if changes else None)

    def _asks(self, step: GradientStep, *wanted: Wanted) -> bool:
        """Whether there is anything to log of *wanted*: without loggers, totals only."""
        return bool(total_norms(*wanted) or self._singles(step, *wanted))

    def _singles(self, step: GradientStep, *wanted: Wanted) -> tuple[float, ...]:
        return single_norms(*wanted) if step.trainer.loggers else ()

    def _observe(self, step: GradientStep) -> None:
        before = self._before.pop(id(step.optimizer), None)
        if not step.will_log:
            return
        before = before or _Before(None, None)
        metrics = _Metrics()
        self._add(metrics, "grad", self._grad, step.norms)
        self._add_clipping(metrics, step)
        self._add(metrics, "param", self._param, before.params)
        after = self._look_after(step, before)
        if (updates := after.pop("update", None)) is not None:
            self._add(metrics, "update", self._update, updates)
            if before.params is not None:
                self._add_ratios(metrics, updates, before.params)
        for kind, norms in after.items():
            self._add(metrics, kind, self._moment, norms)
        self._log(step, metrics)

    def _look_after(self, step: GradientStep, before: _Before) -> dict[str, GradientNorms]:
        """Measure what the step changed, and the optimizer's moments, in one pass."""
        groups: dict[str, TensorGroup] = {}
        if before.weights is not None:
            # A step that did not run has changed nothing, whoever else has trained these weights.
            now = before.weights if step.skipped is True else step.parameters
            change_in_place(before.weights, now)
            groups["update"] = TensorGroup(
                step.names,
                before.weights,
                total_norms(self._update, self._ratio),
                self._singles(step, self._update, self._ratio),
            )
        if self._asks(step, self._moment):
            groups.update(self._moments(step))
        return measure_groups(groups, device=_home(step)) if groups else {}

    def _moments(self, step: GradientStep) -> dict[str, TensorGroup]:
        groups: dict[str, TensorGroup] = {}
        for kind in _MOMENTS:
            names, tensors = moments(step.optimizer.state, step.names, step.parameters, kind)
            if tensors:
                groups[kind] = TensorGroup(
                    names, tensors, total_norms(self._moment), self._singles(step, self._moment)
                )
        if not groups and step.skipped is False and not self._no_moments:
            self._no_moments = True
            if step.trainer.is_global_zero:
                log.warning(
                    "norm_logging.log_moment_norm has nothing to log: %s keeps neither exp_avg nor "
                    "exp_avg_sq. Switch the option off, or use an optimizer like AdamW.",
                    type(step.optimizer).__name__,
                )
        return groups

    def _add(
        self, metrics: _Metrics, kind: str, wanted: Wanted, norms: GradientNorms | None
    ) -> None:
        if norms is None:
            return
        if wanted.total is not None:
            metrics.totals[f"{kind}_norm"] = norms.totals[wanted.total]
        if (p := wanted.each) is not None:
            metrics.totals[f"{kind}_{p}_norm_total"] = norms.totals[p]
            self._add_selected(metrics, f"{kind}_{p}_norm", norms.per_parameter.get(p, {}))
        if (p := wanted.module) is not None:
            modules = self._modules.of(kind, norms.per_parameter.get(p, {}), p)
            metrics.singles |= _named(f"{kind}_{p}_module_norm", modules)

    def _add_selected(self, metrics: _Metrics, name: str, each: Mapping[str, Tensor]) -> None:
        chosen = {n: value for n, value in each.items() if n in self._selection}
        metrics.singles |= _named(name, chosen)

    def _add_clipping(self, metrics: _Metrics, step: GradientStep) -> None:
        # Without clipping it is the very object that was measured before.
        if self._grad.total is None or step.clipped is None or step.clipped is step.norms:
            return
        metrics.totals["grad_norm_clipped"] = step.clipped.totals[self._grad.total]
        coefficient = step.clip_coefficient()
        if coefficient is not None:
            own = step.coefficient
            metrics.totals["grad_clip_coefficient"] = (
                coefficient if own is None else coefficient * own
            )

    def _add_ratios(self, metrics: _Metrics, updates: GradientNorms, params: GradientNorms) -> None:
        wanted = self._ratio
        if (p := wanted.total) is not None:
            metrics.totals["update_ratio"] = ratio(updates.totals[p], params.totals[p])
        if (p := wanted.each) is not None:
            each = ratios(updates.per_parameter.get(p, {}), params.per_parameter.get(p, {}))
            self._add_selected(metrics, f"update_{p}_ratio", each)
        if (p := wanted.module) is not None:
            modules = ratios(
                self._modules.of("update", updates.per_parameter.get(p, {}), p),
                self._modules.of("param", params.per_parameter.get(p, {}), p),
            )
            metrics.singles |= _named(f"update_{p}_module_ratio", modules)

    def _log(self, step: GradientStep, metrics: _Metrics) -> None:
        prefix = "train/"
        if len(step.trainer.optimizers) > 1:
            prefix += f"optimizer_{step.optimizer_index}/"
        full = {
            f"{prefix}{name}{self._suffix}": value
            for name, value in (metrics.totals | metrics.singles).items()
        }
        totals = [f"{prefix}{name}{self._suffix}" for name in metrics.totals]
        shown = totals if self.config.prog_bar else ()
        log_step_metrics(step.trainer, full, totals=totals, prog_bar=shown)


def _home(step: GradientStep) -> torch.device:
    return step.parameters[0].device if step.parameters else torch.device("cpu")


def _named(prefix: str, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": norm for name, norm in norms.items()}
