"""Leaves out optimizer steps with exploding gradients, or clips them, and counts them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks
from nshtrainer.errors import ConfigError
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import (
    GradientPipeline,
    GradientRequest,
    GradientStep,
    StepOutcome,
)
from nshtrainer.runtime.step_metrics import log_step_metrics

from .config import GradientSkippingCallbackConfig
from .decision import Decision, Streak
from .errors import ConsecutiveSkipsError, GradientSpikeError
from .policy import should_skip
from .schedulers import SchedulerHold, schedulers_by_step
from .statistics import NormStatistics, make_statistics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GradientSkippingCallback"]

log = logging.getLogger(__name__)

_NAMED_PARAMETERS: Final = 3


class GradientSkippingCallback(ConfiguredCallback[GradientSkippingCallbackConfig]):
    """Leaves out, or clips, optimizer steps whose gradient norm is too large.

    Logs `train/grad_skipped_steps`, the number of steps left out so far, and
    `train/grad_skipped_fraction`, their share of all steps; with action `clip`
    `train/grad_clipped_steps` and `train/grad_clipped_fraction`; with a policy
    `train/grad_norm_limit`, of each optimizer if there are several. With a label, `/<label>` is
    appended. Steps that a loss scaler skips on its own account are not counted as left out. Counts,
    statistics and streaks go on when training is resumed.

    Waits for the device once a step, unless the optimizer is a fused one of torch's and neither
    action `raise` nor `hold_scheduler` is chosen. With several ranks the largest norm of them
    counts, which takes one reduction of a single number a step.

    Raises:
        GradientSpikeError: In `fit`, before the step, with action `raise`.
        ConsecutiveSkipsError: In `fit`, when `max_consecutive` is reached.
        ConfigError: In `fit`, where `hold_scheduler` meets manual optimization.
    """

    config_class = GradientSkippingCallbackConfig

    def __init__(
        self, config: GradientSkippingCallbackConfig | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        if not self.config.hold_scheduler:
            silence_unused_hooks(self, "on_train_batch_end")
        self._suffix = f"/{self.config.label}" if self.config.label else ""
        self._reason = _reason(self.config)
        self._decided: dict[int, Decision] = {}
        self._statistics: dict[int, NormStatistics] = {}
        self._streaks: dict[int, Streak] = {}
        self._skipped: int | Tensor = 0
        self._clipped: int | Tensor = 0
        self._seen = 0
        self._warn_at = 1
        self._offenders = ""
        self._hold = SchedulerHold()
        self._module: weakref.ref[LightningModule] | None = None

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were left out so far; may wait for the device."""
        return int(self._skipped)

    @property
    def clipped_steps(self) -> int:
        """How many optimizer steps were clipped so far; may wait for the device."""
        return int(self._clipped)

    @property
    def seen_steps(self) -> int:
        """How many optimizer steps there were so far, those left out included."""
        return self._seen

    def __getstate__(self) -> dict[str, Any]:
        """Take along what was counted, and nothing that belongs to this process."""
        return {**self.__dict__, "_module": None, "_decided": {}, "_hold": SchedulerHold()}

    # ---- state -----------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"skipped_steps": self.skipped_steps, "seen_steps": self._seen}
        if self.config.action == "clip":
            state["clipped_steps"] = self.clipped_steps
        if self.config.policy:
            state["policy"] = self.config.policy
            state["statistics"] = {i: s.state_dict() for i, s in self._statistics.items()}
        if self.config.max_consecutive:
            state["streaks"] = {i: s.state() for i, s in self._streaks.items()}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = int(state_dict["skipped_steps"])
        self._seen = int(state_dict["seen_steps"])
        self._clipped = int(state_dict.get("clipped_steps", 0))
        self._warn_at = _next_warning(self._skipped)
        self._streaks = {
            int(i): Streak(*map(int, pair)) for i, pair in state_dict.get("streaks", {}).items()
        }
        self._load_statistics(state_dict)

    def _load_statistics(self, state_dict: Mapping[str, Any]) -> None:
        self._statistics = {}
        if self.config.policy is None:
            return
        fits = state_dict.get("policy") == self.config.policy
        saved = cast("dict[int, dict[str, Tensor]]", state_dict.get("statistics", {}))
        for index, tensors in saved.items():
            statistics = make_statistics(self.config)
            fits = fits and statistics is not None and statistics.load_state_dict(tensors)
            if statistics is not None and fits:
                self._statistics[int(index)] = statistics
        if not fits:
            self._statistics = {}
            rank_zero_only(log.warning)(
                "the checkpoint to resume from has no gradient norms for policy %r as it is "
                "configured now; its statistics begin anew, with a warm-up",
                self.config.policy,
            )

    # ---- the run ---------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.config.hold_scheduler and not pl_module.automatic_optimization:
            raise ConfigError(
                "gradient_skipping.hold_scheduler is set, and the module optimizes manually, so "
                "that it advances its schedules itself; remove hold_scheduler, and leave out "
                "`scheduler.step()` in the module where a step was left out."
            )
        if self._module is None or self._module() is not pl_module:
            # What is known of another module says nothing of this one; a checkpoint is loaded later.
            self._statistics, self._streaks = {}, {}
            self._module = weakref.ref(pl_module)
        self._decided = {}
        attach(trainer, self.state_key).gradients.register(
            self.state_key, request=self._request, decide=self._decide, outcome=self._outcome
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.hold_scheduler and not schedulers_by_step(trainer):
            rank_zero_only(log.warning)(
                "gradient_skipping.hold_scheduler has nothing to hold: no learning rate schedule "
                "has the interval 'step'"
            )

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._hold.release()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for streak in self._streaks.values():
            self._check_streak(trainer, streak)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._hold.release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hold.release()

    # ---- one step --------------------------------------------------------------------------

    def _acts(self, step: GradientStep) -> bool:
        return step.step >= (self.config.start_after_n_steps or 0)

    def _is_idle(self, step: GradientStep) -> bool:
        return self.config.policy is None and not self._acts(step)

    def _request(self, step: GradientStep) -> GradientRequest | None:
        return None if self._is_idle(step) else GradientRequest(totals=(self.config.norm_type,))

    def _decide(self, step: GradientStep) -> StepOutcome | None:
        if step.norms is None or self._is_idle(step):
            return None
        norm = step.norms.totals[self.config.norm_type]
        # A rank that sees another norm, were it by rounding, would learn, scale and stop otherwise.
        norm = step.largest_over_ranks(norm).to(norm.device)
        limit = self._limit(step, norm)
        if not self._acts(step):
            self._note(step, Decision(norm, limit, self._counts(step, norm, None)))
            return None
        # An LBFGS asks again at every evaluation of its closure; the first answer is what counts.
        decision = self._note(step, self._judge(step, norm, limit))
        if self.config.hold_scheduler and decision.left_out:
            self._hold.hold(step.trainer)
        return StepOutcome(
            skipped=decision.left_out,
            reason=self._reason,
            coefficient=self._coefficient(norm, limit),
        )

    def _limit(self, step: GradientStep, norm: Tensor) -> float | Tensor:
        """The largest norm that is not too large."""
        fixed = self.config.threshold or torch.inf
        statistics = self._statistics_of(step)
        return fixed if statistics is None else statistics.limit(norm).clamp(max=fixed)

    def _statistics_of(self, step: GradientStep) -> NormStatistics | None:
        index = step.optimizer_index
        if index not in self._statistics:
            statistics = make_statistics(self.config)
            if statistics is None:
                return None
            self._statistics[index] = statistics
        return self._statistics[index]

    def _counts(
        self, step: GradientStep, norm: Tensor, limit: float | Tensor | None
    ) -> Tensor | None:
        """Whether *norm* belongs into the statistics, if there are any: a norm, and no spike."""
        statistics = self._statistics_of(step)
        if statistics is None:
            return None
        # A part that is not trained yet has norm 0, after which any norm would be a spike.
        counts = torch.isfinite(norm) & (norm > 0) & (norm <= (self.config.threshold or torch.inf))
        if limit is None or not statistics.excludes_spikes:
            return counts
        return counts & (norm <= limit)

    def _judge(self, step: GradientStep, norm: Tensor, limit: float | Tensor) -> Decision:
        config = self.config
        if config.policy is None and config.action == "skip" and _host_has_to_know(step):
            # The wait that the pipeline had before it, and no work for the device besides.
            too_large = should_skip(norm.item(), limit, skip_non_finite=config.skip_non_finite)
            return Decision(norm, limit, None, too_large)
        over = should_skip(norm, limit, skip_non_finite=False)
        if config.action == "raise" and bool(over):
            raise self._spike(step, norm, limit)
        left_out: bool | Tensor = False
        if config.action == "skip" or config.skip_non_finite:
            largest = limit if config.action == "skip" else torch.inf
            left_out = should_skip(norm, largest, skip_non_finite=config.skip_non_finite)
        if config.hold_scheduler:
            left_out = bool(left_out)
        clipped = over if config.action == "clip" else None
        return Decision(norm, limit, self._counts(step, norm, limit), left_out, clipped)

    def _note(self, step: GradientStep, decision: Decision) -> Decision:
        return self._decided.setdefault(step.optimizer_index, decision)

    def _coefficient(self, norm: Tensor, limit: float | Tensor) -> Tensor | None:
        if self.config.action != "clip":
            return None
        over = should_skip(norm, limit, skip_non_finite=False)
        return torch.where(over, limit / norm, 1.0).to(norm.dtype)

    def _spike(self, step: GradientStep, norm: Tensor, limit: float | Tensor) -> GradientSpikeError:
        return GradientSpikeError(
            f"the gradient norm is {float(norm):.4g} at optimizer step {step.step}; at most "
            f"{float(limit):.4g} was expected (the limit is {_limits(self.config)}). The largest "
            f"gradients are those of {self._largest(step)}; the weights are those before the step. "
            "Look at this batch and the learning rate, or set gradient_skipping.action to 'skip' or "
            "'clip'."
        )

    def _largest(self, step: GradientStep) -> str:
        largest = step.largest_parameters(self.config.norm_type, _NAMED_PARAMETERS)
        return ", ".join(f"{name} ({norm:.4g})" for name, norm in largest)

    # ---- its outcome -----------------------------------------------------------------------

    def _outcome(self, step: GradientStep, skipped: bool | Tensor) -> None:
        decision = self._decided.pop(step.optimizer_index, None)
        self._seen += 1
        if decision is not None:
            statistics = self._statistics.get(step.optimizer_index)
            if statistics is not None and decision.counts is not None:
                statistics.update(decision.norm, decision.counts)
            self._count(step, decision, skipped)
        if step.will_log:
            self._log(step, decision)

    def _count(self, step: GradientStep, decision: Decision, skipped: bool | Tensor) -> None:
        left_out, clipped = decision.left_out, decision.clipped
        if not isinstance(skipped, Tensor):
            left_out = skipped and bool(left_out)
            clipped = None if skipped else clipped
        elif clipped is not None:
            clipped = clipped & ~skipped
        # Not in place: what was logged before still refers to the old number.
        self._skipped = self._skipped + _as_number(left_out)
        if clipped is not None:
            self._clipped = self._clipped + _as_number(clipped)
        if isinstance(skipped, Tensor):
            self._offenders = ""  # looking for them would make the host wait
        elif left_out:
            self._offenders = self._largest(step)
        if self.config.max_consecutive is not None:
            streak = self._streaks.setdefault(step.optimizer_index, Streak())
            streak.add(left_out)
            if streak.is_known() or step.will_log:
                self._check_streak(step.trainer, streak)

    def _check_streak(self, trainer: Trainer, streak: Streak) -> None:
        most = self.config.max_consecutive
        if most is None or (length := streak.take()) < most:
            return
        raise ConsecutiveSkipsError(
            f"{length} optimizer steps in a row were left out up to step {trainer.global_step} "
            f"({self._reason}); fewer than gradient_skipping.max_consecutive, {most}, were "
            f"expected. {self._largest_so_far()}Resume from an earlier checkpoint with a lower "
            "learning rate or other data, or raise the limit."
        )

    def _largest_so_far(self) -> str:
        return f"The largest gradients were those of {self._offenders}. " if self._offenders else ""

    def _log(self, step: GradientStep, decision: Decision | None) -> None:
        counts: dict[str, int | Tensor] = {"skipped": self._skipped}
        if self.config.action == "clip":
            counts["clipped"] = self._clipped
        totals: dict[str, float | Tensor] = {}
        for what, count in counts.items():
            totals[f"train/grad_{what}_steps{self._suffix}"] = count
            totals[f"train/grad_{what}_fraction{self._suffix}"] = count / self._seen
        metrics = dict(totals)
        if self.config.policy and decision is not None:
            several = len(step.trainer.optimizers) > 1
            part = f"optimizer_{step.optimizer_index}/" if several else ""
            metrics[f"train/{part}grad_norm_limit{self._suffix}"] = decision.limit
        shown = [f"train/grad_{what}_steps{self._suffix}" for what in counts]
        prog_bar = shown if self.config.prog_bar else ()
        log_step_metrics(step.trainer, metrics, totals=totals, prog_bar=prog_bar)

    def on_optimizer_step_skipped(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        count: int,
        reasons: Sequence[str],
    ) -> None:
        """Warn of the first skipped step, and whenever their number has doubled."""
        if self._reason not in reasons or (skipped := self.skipped_steps) < self._warn_at:
            return
        self._warn_at = _next_warning(skipped)
        if trainer.is_global_zero:
            log.warning(
                "%d of %d optimizer steps were left out so far (%s); the next warning comes at %d. "
                "%sIf this goes on, lower the learning rate or raise the limit.",
                skipped,
                self._seen,
                self._reason,
                self._warn_at,
                self._largest_so_far(),
            )


def _host_has_to_know(step: GradientStep) -> bool:
    """Whether the host waits for this step's decision anyway, and this rank's is that of all."""
    return (
        step.trainer.world_size == 1
        and step.scale is None
        and not GradientPipeline.supports_device_skip(step.optimizer)
    )


def _limits(config: GradientSkippingCallbackConfig) -> str:
    """What a norm must not be above, for people."""
    fixed = [] if config.threshold is None else [f"{config.threshold:g}"]
    learnt = [] if config.policy is None else [f"its {config.policy} limit"]
    return " or ".join(fixed + learnt)


def _reason(config: GradientSkippingCallbackConfig) -> str:
    """Why steps are left out, for people; the same in the whole run."""
    above = [f"above {_limits(config)}"] if config.action == "skip" else []
    not_finite = ["not finite"] if config.skip_non_finite else []
    return "gradient norm " + " or ".join(above + not_finite)


def _as_number(flag: bool | Tensor) -> int | Tensor:
    """For a sum with an integer: a boolean tensor counts there as it is."""
    return flag if isinstance(flag, Tensor) else int(flag)


def _next_warning(skipped: int) -> int:
    return 1 << skipped.bit_length()
