"""What the clients of the gradient pipeline see and say: the step, the request, the outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden

from nshtrainer.errors import ConfigError
from nshtrainer.runtime.gradient_norms import (
    GradientNorms,
    largest_names,
    measure_norms,
    non_finite_names,
    scale_in_place,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["SCALER_SKIPPED", "GradientRequest", "GradientStep", "StepOutcome"]

SCALER_SKIPPED: Final = "non-finite gradients (GradScaler)"
"""The reason given when Lightning's loss scaler, and no client, skipped a step."""

_CLIP_EPSILON: Final = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class GradientRequest:
    """What a client wants measured at one step; requests of all clients are merged.

    Raises:
        ConfigError: A norm type is not a positive number (`inf` is one).
    """

    totals: tuple[float, ...] = ()
    """Norm types over all of the optimizer's gradients."""
    per_parameter: tuple[float, ...] = ()
    """Norm types for each parameter."""
    finite: bool = False
    """Whether every gradient is finite."""
    clipped: bool = False
    """Whether the same norms are wanted after clipping too, as `GradientStep.clipped`."""
    evidence: bool = False
    """Whether gradients that are not finite are to be named later, by `GradientNorms.evidence`."""

    def __post_init__(self) -> None:
        """Check the norm types, which usually come from a config."""
        for norm_type in (*self.totals, *self.per_parameter):
            if not norm_type > 0:
                raise ConfigError(
                    f"norm type {norm_type!r} was requested of a gradient; a norm type is a "
                    "positive number or inf. Use 2.0 for the Euclidean norm."
                )

    @classmethod
    def union(cls, requests: Iterable[GradientRequest | None]) -> GradientRequest | None:
        """Return one request for all that *requests* ask, or `None` if they ask nothing."""
        asked = [request for request in requests if request is not None]
        if not asked:
            return None
        return cls(
            totals=tuple(sorted({p for request in asked for p in request.totals})),
            per_parameter=tuple(sorted({p for request in asked for p in request.per_parameter})),
            finite=any(request.finite or request.evidence for request in asked),
            evidence=any(request.evidence for request in asked),
            clipped=any(request.clipped for request in asked),
        )


@dataclass(frozen=True)
class StepOutcome:
    """A client's decision about one optimizer step."""

    skipped: bool | Tensor
    """Whether to skip; a 0-dim tensor (non-zero: skip) spares the wait for the device where
    `GradientPipeline.supports_device_skip` says so."""
    reason: str
    """Why, for people; a short constant, since skips are counted by it."""
    coefficient: Tensor | None = None
    """What to multiply the gradients by: 0-dim, in (0, 1], the same on all ranks. The smallest of
    all clients' is applied once, when all have decided; Lightning clips after that."""


@dataclass(eq=False)
class GradientStep:
    """One attempt of one optimizer to step; lives until its outcome is known."""

    trainer: Trainer
    pl_module: LightningModule
    optimizer: Optimizer
    """The torch optimizer itself, never Lightning's wrapper."""
    optimizer_index: int
    """Position in `trainer.optimizers`; -1 if it is not there."""
    step: int
    """`trainer.global_step` before this step."""
    will_log: bool
    """Whether Lightning sends step metrics of this batch to the loggers."""
    parameters: list[Tensor]
    """This optimizer's distinct tensors, in the order of its parameter groups."""
    names: list[str]
    """Their names in the LightningModule, without the prefixes of compiled or wrapped modules."""
    scale: Tensor | None = None
    """What `grads` are still multiplied by (fused optimizer under a GradScaler), else `None`."""
    norms: GradientNorms | None = None
    """What was requested, unscaled and before clipping; `None` if nobody asked."""
    clipped: GradientNorms | None = None
    """The same after clipping; in the observe phase, if requested and the step ran."""
    skipped: bool | Tensor = False
    """Whether the step is skipped, for the same reasons on all ranks; final from observe on."""
    reasons: tuple[str, ...] = ()
    """Why, as far as the host knows."""
    flags: list[tuple[str, Tensor]] = field(default_factory=list["tuple[str, Tensor]"])
    """Reasons whose truth only the device knows, each with its 0-dim flag."""
    request: GradientRequest | None = None
    """The union of the requests."""
    coefficient: Tensor | None = None
    """What the gradients were multiplied by after they were measured, as clients asked; 0-dim."""
    released: list[tuple[str, Tensor]] = field(default_factory=list["tuple[str, Tensor]"])
    """Names and gradients of a step that the host skipped, until its outcome was told."""

    @property
    def grads(self) -> list[Tensor | None]:
        """The gradients as they are now, aligned with `parameters`."""
        return [parameter.grad for parameter in self.parameters]

    def measure(self) -> GradientNorms | None:
        """Measure the gradients as they are now; `None` if nothing was requested.

        No host synchronization; a collective where gradients are sharded.
        """
        request = self.request
        if request is None:
            return None
        totals = set(request.totals)
        if request.clipped and self._clips_by_norm():
            totals.add(2.0)  # Lightning clips by the 2-norm, so the coefficient comes from it
        if not (totals or request.per_parameter or request.finite):
            return None
        names, grads = self._present()
        return measure_norms(
            names,
            grads,
            totals=totals,
            per_parameter=request.per_parameter,
            finite=request.finite,
            evidence=request.evidence,
            scale=self.scale,
            device=self.parameters[0].device if self.parameters else torch.device("cpu"),
        )

    def clip_coefficient(self) -> Tensor | None:
        """Return what Lightning multiplies the gradients by when it clips: 0-dim, at most 1.

        `None` where it is not known: clipping by value, a module that overrides
        `configure_gradient_clipping`, or no 2-norm measured. One where nothing is clipped between
        measuring and the step. Source of the formula: `torch.nn.utils.clip_grad_norm_`.
        """
        if self._is_unclipped():
            return torch.ones((), device=self.parameters[0].device if self.parameters else None)
        if self.norms is None or not self._clips_by_norm() or 2.0 not in self.norms.totals:
            return None
        limit = float(self.trainer.gradient_clip_val or 0.0)
        total = self.norms.totals[2.0]
        if self.coefficient is not None:
            total = total * self.coefficient
        return (limit / (total + _CLIP_EPSILON)).clamp(max=1.0)

    def measure_clipped(self) -> GradientNorms | None:
        """Return the norms of the clipped gradients; to be called before they are released.

        From the coefficients where they are known, else by a second pass.
        """
        norms = self.norms
        if norms is not None and self.coefficient is not None:
            norms = norms.scaled_by(self.coefficient)
        if norms is None or self._is_unclipped():
            return norms
        coefficient = self.clip_coefficient()
        return self.measure() if coefficient is None else norms.scaled_by(coefficient)

    def non_finite_parameters(self) -> list[str]:
        """Return the names of parameters whose gradient has a NaN or Inf.

        Exact, unlike `GradientNorms.finite`; waits for the device, and is a collective where
        gradients are sharded: for the rare step that needs an explanation. Of a step that the host
        skipped it can be asked until the end of the outcome phase.
        """
        return non_finite_names(*self._present())

    def largest_parameters(self, norm_type: float, count: int) -> list[tuple[str, float]]:
        """Return the *count* parameters with the largest gradients, largest first: name and norm.

        Unscaled; what is not finite comes before all numbers. When to ask, and at what cost: as
        `non_finite_parameters`.
        """
        return largest_names(*self._present(), norm_type, self.scale, count)

    def largest_over_ranks(self, value: Tensor) -> Tensor:
        """Return the largest *value* of all ranks, element by element; all must call.

        With several ranks NaN counts as Inf, since a reduction may drop it, and the answer is on the
        strategy's device. The host does not wait where torch.distributed does the work.
        """
        if self.trainer.world_size == 1:
            return value
        value = torch.nan_to_num(
            value.detach().to(self.trainer.strategy.root_device), nan=math.inf, posinf=math.inf
        )
        if dist.is_available() and dist.is_initialized():
            # Not `strategy.reduce`: Lightning puts a barrier before it, for which NCCL lets the
            # host wait.
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            return value
        strategy: Any = self.trainer.strategy
        return strategy.reduce(value, reduce_op="max")

    def scale_gradients(self, coefficient: Tensor) -> None:
        """Multiply this optimizer's gradients in place by *coefficient*, 0-dim; no host wait."""
        scale_in_place([grad for grad in self.grads if grad is not None], coefficient)
        before = self.coefficient
        self.coefficient = coefficient if before is None else before * coefficient

    def release_gradients(self) -> None:
        """Set this optimizer's gradients to `None`, so that its step changes nothing at all."""
        self.released = list(zip(*self._present(), strict=True))
        for parameter in self.parameters:
            parameter.grad = None

    def _present(self) -> tuple[list[str], list[Tensor]]:
        if self.released:
            return [name for name, _ in self.released], [grad for _, grad in self.released]
        grads = [grad for parameter in self.parameters if (grad := parameter.grad) is not None]
        if len(grads) == len(self.names):
            return self.names, grads
        pairs = zip(self.names, self.parameters, strict=True)
        return [name for name, parameter in pairs if parameter.grad is not None], grads

    def _is_unclipped(self) -> bool:
        """Whether nothing lies between measuring and the step (manual: the user clips before)."""
        if not self.pl_module.automatic_optimization:
            return True
        return not self.trainer.gradient_clip_val and not self._has_own_clipping()

    def _clips_by_norm(self) -> bool:
        if self._is_unclipped() or self._has_own_clipping():
            return False
        return str(getattr(self.trainer.gradient_clip_algorithm, "value", "norm")) == "norm"

    def _has_own_clipping(self) -> bool:
        return is_overridden("configure_gradient_clipping", self.pl_module)
