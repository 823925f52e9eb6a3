"""Looks for NaN and Inf in losses, gradients and parameters, and for missing gradients."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradient_norms import measure_norms, non_finite_names
from nshtrainer.runtime.gradients import GradientRequest, GradientStep, StepOutcome
from nshtrainer.runtime.optimizer_hooks import plain_name

from . import acting
from .acting import ACTING, HOST, Finding
from .config import FiniteChecksCallbackConfig
from .errors import NonFiniteParameterError
from .explaining import Explainer
from .findings import SCALER_PATIENCE, Throttle, has_scaler, shorten
from .reports import Reports

if TYPE_CHECKING:
    from nshtrainer.run.run import Run

__all__ = ["FiniteChecksCallback"]

log = logging.getLogger(__name__)


class FiniteChecksCallback(ConfiguredCallback[FiniteChecksCallbackConfig]):
    """Checks losses, gradients and parameters; see `FiniteChecksCallbackConfig`.

    Steps are judged after accumulation and unscaling and before they are applied, on all ranks
    alike.

    Args:
        config: The configuration.
        run: The run whose folder takes dumps; None takes the trainer's root directory.
        options: Its fields, if no configuration is given.

    Raises:
        NonFiniteLossError: In `fit`, before the step, if `nonfinite_loss` is `raise`.
        NonFiniteGradientError: In `fit`, before the step, if `nonfinite_grads` is `raise`.
        MissingGradientError: In `fit`, before the step, if `none_grads` is `raise`.
        NonFiniteParameterError: In `fit`, if `nonfinite_params` is `raise`.
    """

    config_class = FiniteChecksCallbackConfig

    def __init__(
        self,
        config: FiniteChecksCallbackConfig | None = None,
        run: Run | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self._run = run
        self._explains = self.config.find_module or self.config.dump
        if self.config.nonfinite_loss == "ignore":
            silence_unused_hooks(self, "on_before_backward")
        if not self._explains:
            silence_unused_hooks(self, "on_train_batch_start")
        self._forget()

    def _looks_at(self, option: str) -> bool:
        """Whether the decision about a step depends on this check."""
        action = getattr(self.config, option)
        explained = self._explains and option != "none_grads" and action != "ignore"
        return action in ACTING or explained

    @property
    def _host_looks(self) -> bool:
        """Whether the host has to know at every step."""
        config = self.config
        actions = {config.nonfinite_loss, config.nonfinite_grads, config.none_grads}
        return self._explains or not actions.isdisjoint(HOST)

    # ---- the run ---------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()
        if stage != "fit":
            return
        checks = ("nonfinite_loss", "nonfinite_grads", "none_grads")
        decides = any(self._looks_at(option) for option in checks)
        actions = {getattr(self.config, option) for option in (*checks, "nonfinite_params")}
        if actions != {"ignore"}:
            attach(trainer, self.state_key).gradients.register(
                self.state_key,
                request=self._request,
                decide=self._decide if decides else None,
                outcome=self._outcome,
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._explains:
            self._explainer.prepare(trainer, pl_module)
        if self.config.nonfinite_params != "ignore":
            named = [(plain_name(n), p.detach()) for n, p in pl_module.named_parameters()]
            names, parameters = [n for n, _ in named], [p for _, p in named]
            self._check_parameters(trainer, names, parameters, "when training starts")

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._explainer.keep(trainer, batch, batch_idx)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._reports.losses.add(
            loss.detach(),
            trainer.global_step,
            nan_only=has_scaler(trainer),  # with one, the loss comes scaled
            decides=self._looks_at("nonfinite_loss"),
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reports.send(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            self._reports.send(trainer)
        except Exception:  # a device that is gone must not hide why
            log.debug("findings could not be read from the device", exc_info=True)
        self._forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        self._reports = Reports(self.config)
        self._explainer = Explainer(self.config, self._run)
        self._streaks: dict[int, int] = {}
        self._parameter_throttle = Throttle()
        self._without_grad: set[str] = set()
        self._has_stopped = False

    # ---- one step --------------------------------------------------------------------------

    def _request(self, step: GradientStep) -> GradientRequest | None:
        if self.config.none_grads == "warn":
            self._name_missing(step, _missing(step), "and are not trained by it")
        action = self.config.nonfinite_grads
        if action == "ignore":
            return None
        return GradientRequest(finite=True, evidence=action not in HOST)

    def _decide(self, step: GradientStep) -> StepOutcome | None:
        missing = _missing(step) if self._looks_at("none_grads") else []
        bad_loss = self._reports.losses.take_step() if self._looks_at("nonfinite_loss") else None
        bad_grads = self._bad_gradients(step)
        if not self._host_looks:
            return self._skip(step, missing, bad_loss, bad_grads)
        found = self._findings(step, missing, bad_loss, bad_grads)
        if not found:
            return None
        explanation = self._explainer.explain(step, found) if self._explains else ""
        for finding in found:
            if finding.action == "raise":
                raise finding.error(f"{finding.text}. {finding.advice}{explanation}")
        return self._carry_out(step, found, explanation)

    def _bad_gradients(self, step: GradientStep) -> Tensor | None:
        norms = step.norms
        if norms is None or norms.finite is None or not self._looks_at("nonfinite_grads"):
            return None
        return ~norms.finite

    def _skip(
        self,
        step: GradientStep,
        missing: Sequence[str],
        bad_loss: Tensor | None,
        bad_grads: Tensor | None,
    ) -> StepOutcome | None:
        """Skip the step by what the device knows."""
        if missing:
            self._name_missing(step, missing, "so that the step is skipped")
            return StepOutcome(True, acting.missing(step, "skip", missing).reason)
        if has_scaler(step.trainer):
            bad_grads = None  # such steps are skipped by the scaler, which learns from them
        flags = [flag for flag in (bad_loss, bad_grads) if flag is not None]
        if not flags:
            return None
        device = flags[-1].device
        skipped = torch.stack([flag.to(device) for flag in flags]).any()
        return StepOutcome(skipped, "NaN or Inf in the loss or the gradients")

    def _findings(
        self,
        step: GradientStep,
        missing: Sequence[str],
        bad_loss: Tensor | None,
        bad_grads: Tensor | None,
    ) -> list[Finding]:
        """Return what is wrong with the step on any rank, causes first; waits for the device."""
        config = self.config
        flags = [bool(missing), bad_loss, bad_grads]
        any_missing, any_loss, any_grads = _on_any_rank(step, flags)
        found: list[Finding] = []
        if any_loss:
            here = bad_loss is not None and bool(bad_loss)
            found.append(acting.loss(step, config.nonfinite_loss, here=here))
        if bad_grads is not None and (names := self._offenders(step, any_grads)) is not None:
            found.append(acting.gradients(step, config.nonfinite_grads, names))
        if any_missing:
            found.append(acting.missing(step, config.none_grads, missing))
        return found

    def _offenders(self, step: GradientStep, suspected: bool) -> list[str] | None:
        """Return the names of this rank; None if there is no finding on any."""
        key = id(step.optimizer)
        if not suspected:
            self._streaks[key] = 0
            return None
        names = step.non_finite_parameters()
        if not _on_any_rank(step, [bool(names)])[0]:  # the norm overflowed, the gradients did not
            return None
        self._streaks[key] = self._streaks.get(key, 0) + 1
        if has_scaler(step.trainer) and self._streaks[key] < SCALER_PATIENCE:
            log.debug("the GradScaler is searching its scale at step %d", step.step)
            return None
        return names

    def _carry_out(
        self, step: GradientStep, found: Sequence[Finding], explanation: str
    ) -> StepOutcome | None:
        acted = [finding for finding in found if finding.action in ACTING]
        stopping = [finding for finding in acted if finding.action == "stop"]
        if stopping:
            step.trainer.should_stop = True
        if stopping and not self._has_stopped:
            self._has_stopped = True
            log.warning(
                "%s. Training stops; the weights are those before the step.%s",
                stopping[0].text,
                explanation,
            )
        elif explanation:
            log.warning("%s.%s", found[0].text, explanation)
        for finding in acted:
            if finding.what == "missing gradients" and finding.action == "skip":
                self._name_missing(step, finding.names, "so that the step is skipped")
        return StepOutcome(True, acted[0].reason) if acted else None

    def _name_missing(self, step: GradientStep, names: Sequence[str], consequence: str) -> None:
        """Warn of parameters without a gradient, of each once."""
        if new := [name for name in names if name not in self._without_grad]:
            self._without_grad.update(new)
            log.warning(
                "%d parameters have no gradient at optimizer step %d, %s: %s. Use or freeze them, or "
                'set finite_checks.none_grads to "ignore".',
                len(new),
                step.step,
                consequence,
                shorten(new),
            )

    # ---- after the step --------------------------------------------------------------------

    def _outcome(self, step: GradientStep, skipped: bool | Tensor) -> None:
        self._explainer.end_step()
        self._reports.add(step)
        if not step.will_log:
            return
        self._reports.send(step.trainer)
        if self.config.nonfinite_params != "ignore":
            parameters = [parameter.detach() for parameter in step.parameters]
            when = f"after optimizer step {step.step}"
            self._check_parameters(step.trainer, step.names, parameters, when)

    def _check_parameters(
        self, trainer: Trainer, names: Sequence[str], parameters: Sequence[Tensor], when: str
    ) -> None:
        home = parameters[0].device if parameters else torch.device("cpu")
        norms = measure_norms(
            names, parameters, totals=(), per_parameter=(), finite=True, scale=None, device=home
        )
        is_bad = norms.finite is not None and not bool(norms.finite)
        bad = non_finite_names(names, parameters) if is_bad else []
        action = self.config.nonfinite_params
        is_found = bool(bad)
        if action in HOST:
            is_found = trainer.strategy.reduce_boolean_decision(is_found, all=False)
        if not is_found:
            return
        text = (
            f"{len(bad)} of {len(names)} parameters have a NaN or Inf {when}: "
            f"{shorten(bad) or 'they are on another rank'}"
        )
        if action == "raise":
            raise NonFiniteParameterError(
                f"{text}. Weights have to be finite. Begin from an earlier checkpoint, look at the "
                'learning rate, and set finite_checks.nonfinite_grads to "raise" to see which step '
                "does this."
            )
        if action == "stop":
            trainer.should_stop = True
        if self._parameter_throttle.allows():
            log.warning("%s.%s", text, " Training stops." if action == "stop" else "")


def _missing(step: GradientStep) -> list[str]:
    if all([parameter.grad is not None for parameter in step.parameters]):  # noqa: C419 -- at every step, and a list is made in half the time
        return []
    return [
        name
        for name, parameter in zip(step.names, step.parameters, strict=True)
        if parameter.grad is None and parameter.requires_grad
    ]


def _on_any_rank(step: GradientStep, flags: Sequence[bool | Tensor | None]) -> list[bool]:
    """Return each flag as it is on any rank; all must call. Waits for the device if it has to."""
    if step.trainer.world_size == 1 and not any(isinstance(flag, Tensor) for flag in flags):
        return [bool(flag) for flag in flags]
    device = step.trainer.strategy.root_device
    numbers = [
        flag.to(device, torch.float32)
        if isinstance(flag, Tensor)
        else torch.full((), float(bool(flag)), device=device)
        for flag in flags
    ]
    values: list[float] = step.largest_over_ranks(torch.stack(numbers)).tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- torch's stub
    return [value > 0 for value in values]
