"""Leaves out optimizer steps with exploding gradients, and counts them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientRequest, GradientStep, StepOutcome
from nshtrainer.runtime.step_metrics import log_step_metrics

from .config import GradientSkippingCallbackConfig
from .policy import should_skip

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GradientSkippingCallback"]

log = logging.getLogger(__name__)


class GradientSkippingCallback(ConfiguredCallback[GradientSkippingCallbackConfig]):
    """Leaves out optimizer steps whose gradient norm is too large.

    Logs `train/grad_skipped_steps`, the number of steps left out so far, and
    `train/grad_skipped_fraction`, their share of all steps; with a label, `/<label>` is appended.
    Steps that a loss scaler skips on its own account are not counted as left out. Both counts go
    on when training is resumed.

    Waits for the device once a step, unless the optimizer is a fused one of torch's.
    """

    config_class = GradientSkippingCallbackConfig

    def __init__(
        self, config: GradientSkippingCallbackConfig | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        suffix = f"/{self.config.label}" if self.config.label else ""
        self._names = (
            f"train/grad_skipped_steps{suffix}",
            f"train/grad_skipped_fraction{suffix}",
        )
        self._reason = f"gradient norm above {self.config.threshold:g}" + (
            " or not finite" if self.config.skip_non_finite else ""
        )
        self._decided: dict[int, Tensor] = {}
        self._skipped: int | Tensor = 0
        self._seen = 0
        self._warn_at = 1

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were left out so far; may wait for the device."""
        return int(self._skipped)

    @property
    def seen_steps(self) -> int:
        """How many optimizer steps there were so far, those left out included."""
        return self._seen

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "seen_steps": self._seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = int(state_dict["skipped_steps"])
        self._seen = int(state_dict["seen_steps"])
        self._warn_at = _next_warning(self._skipped)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._decided = {}
            attach(trainer, self.state_key).gradients.register(
                self.state_key,
                request=self._request,
                decide=self._decide,
                outcome=self._outcome,
            )

    def _request(self, step: GradientStep) -> GradientRequest | None:
        if step.step < (self.config.start_after_n_steps or 0):
            return None
        return GradientRequest(totals=(self.config.norm_type,))

    def _decide(self, step: GradientStep) -> StepOutcome | None:
        if step.step < (self.config.start_after_n_steps or 0) or step.norms is None:
            return None
        flag = should_skip(
            step.norms.totals[self.config.norm_type],
            self.config.threshold,
            skip_non_finite=self.config.skip_non_finite,
        )
        # An LBFGS asks again at every evaluation of its closure; the first answer is what counts.
        self._decided.setdefault(step.optimizer_index, flag)
        return StepOutcome(skipped=flag, reason=self._reason)

    def _outcome(self, step: GradientStep, skipped: bool | Tensor) -> None:
        flag = self._decided.pop(step.optimizer_index, None)
        self._seen += 1
        if flag is not None and isinstance(skipped, Tensor):
            # Not in place: what was logged before still refers to the old number.
            self._skipped = self._skipped + flag.long()
        elif flag is not None and skipped:
            self._skipped = self._skipped + int(flag)
        if step.will_log:
            values = (self._skipped, self._skipped / self._seen)
            metrics = dict(zip(self._names, values, strict=True))
            log_step_metrics(step.trainer, metrics, totals=self._names)

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
                "If this goes on, lower the learning rate or raise the threshold.",
                skipped,
                self._seen,
                self._reason,
                self._warn_at,
            )


def _next_warning(skipped: int) -> int:
    return 1 << skipped.bit_length()
