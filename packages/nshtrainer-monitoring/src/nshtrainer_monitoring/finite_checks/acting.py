"""What is said and done about a finding in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from nshtrainer.errors import NshTrainerError
from nshtrainer.runtime.gradients import GradientStep

from .config import Action
from .errors import MissingGradientError, NonFiniteGradientError, NonFiniteLossError
from .findings import shorten

__all__ = ["ACTING", "HOST", "Finding", "gradients", "loss", "missing"]

ACTING: Final = frozenset({"raise", "stop", "skip"})
"""Actions by which a step is not applied."""

HOST: Final = frozenset({"raise", "stop"})
"""Of these, the ones that the host carries out."""


@dataclass(frozen=True)
class Finding:
    """Something that should not be in a step."""

    what: Literal["loss", "gradients", "missing gradients"]
    action: Action
    names: Sequence[str]
    """Parameters concerned, of this rank."""
    text: str
    """What happened."""
    advice: str
    """What to do, if it ends the run."""
    error: type[NshTrainerError]

    @property
    def reason(self) -> str:
        """Why the step is skipped; a short constant."""
        return f"{'' if self.what == 'missing gradients' else 'non-finite '}{self.what}"


def loss(step: GradientStep, action: Action, *, here: bool) -> Finding:
    """A loss is NaN or Inf, on this rank or another one."""
    rank = "" if here else ", on another rank"
    return Finding(
        "loss",
        action,
        (),
        f"the loss is NaN or Inf at optimizer step {step.step}{rank}",
        "A loss has to be finite; the weights are those before the step. Look at this batch and the "
        'learning rate, or set finite_checks.nonfinite_loss to "skip" or "warn".',
        NonFiniteLossError,
    )


def gradients(step: GradientStep, action: Action, names: Sequence[str]) -> Finding:
    """Gradients of *names* have a NaN or Inf; none are those of another rank."""
    return Finding(
        "gradients",
        action,
        names,
        f"{len(names)} of {len(step.names)} parameters have a NaN or Inf gradient at optimizer "
        f"step {step.step}: {shorten(names) or 'they are on another rank'}",
        "Gradients have to be finite; the weights are those before the step. Look at this batch and "
        'the learning rate, skip such steps (nonfinite_grads: "skip", or gradient_skipping with '
        'skip_non_finite), or set finite_checks.nonfinite_grads to "warn".',
        NonFiniteGradientError,
    )


def missing(step: GradientStep, action: Action, names: Sequence[str]) -> Finding:
    """Trainable parameters have no gradient; none are those of another rank."""
    return Finding(
        "missing gradients",
        action,
        names,
        f"{len(names)} of {len(step.names)} parameters have no gradient at optimizer step "
        f"{step.step}: {shorten(names) or 'they are on another rank'}",
        "Every trainable parameter of an optimizer has to take part in the loss. Use them, freeze "
        'them (requires_grad=False), or set finite_checks.none_grads to "warn" or "ignore".',
        MissingGradientError,
    )
