"""The gradient pipeline: what happens between a backward pass and the weights, in fixed phases.

transform -> measure -> decide -> (Lightning clips) -> observe -> outcome, once per attempt of an
optimizer to step, after unscaling and accumulation. Clients register for phases and not for
Lightning's hooks, so nothing depends on the order of callbacks; within a phase clients are called
in the order of their owners' names. An LBFGS evaluates its closure, hence the first three phases,
many times in one attempt; observe and outcome still come once.

`trainer.global_step` counts attempts and learning-rate schedules advance, skipped or not, as
with Lightning's own skips under AMP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nshtrainer.errors import NshTrainerError
from nshtrainer.runtime.events import ON_OPTIMIZER_STEP_SKIPPED, emit, name_culprit
from nshtrainer.runtime.gradient_norms import FiniteEvidence, GradientNorms
from nshtrainer.runtime.gradient_step import (
    SCALER_SKIPPED,
    GradientRequest,
    GradientStep,
    StepOutcome,
)
from nshtrainer.runtime.optimizer_hooks import (
    ObservedOptimizer,
    steps_scaled_gradients,
    supports_device_skip,
)
from nshtrainer.runtime.skip_counts import SkipCounts
from nshtrainer.runtime.step_metrics import is_logging_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "SCALER_SKIPPED",
    "ClientConflictError",
    "FiniteEvidence",
    "GradientNorms",
    "GradientPipeline",
    "GradientRequest",
    "GradientStep",
    "StepOutcome",
]

NOT_RUN = "the optimizer did not step"
"""The reason when a step was announced, and neither ran nor was skipped by a GradScaler."""

OTHER_RANK = "decided on another rank"
"""The reason on ranks whose own clients would have stepped."""

Transform: TypeAlias = "Callable[[GradientStep], None]"
Request: TypeAlias = "Callable[[GradientStep], GradientRequest | None]"
Decide: TypeAlias = "Callable[[GradientStep], StepOutcome | None]"
Observe: TypeAlias = "Callable[[GradientStep], None]"
Outcome: TypeAlias = "Callable[[GradientStep, bool | Tensor], None]"


class ClientConflictError(NshTrainerError, ValueError):
    """Two clients of one trainer's gradient pipeline claim one owner name."""


@dataclass(frozen=True)
class _Client:
    transform: Transform | None
    request: Request | None
    decide: Decide | None
    observe: Observe | None
    outcome: Outcome | None


class GradientPipeline:
    """The pipeline of one trainer; the runtime driver feeds it.

    Args:
        changed: Called when the first client comes or the last one goes.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._trainer: Trainer | None = None
        self._clients: dict[str, _Client] = {}
        self._observed: dict[int, ObservedOptimizer] = {}
        self._counts = SkipCounts()

    @property
    def active(self) -> bool:
        """Whether there is any client."""
        return bool(self._clients)

    def register(
        self,
        owner: str,
        *,
        transform: Transform | None = None,
        request: Request | None = None,
        decide: Decide | None = None,
        observe: Observe | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        """Register a client until `unregister` or the end of the run.

        Args:
            owner: Unique per trainer, such as a callback's `state_key`; orders the clients.
            transform: Changes gradients in place, or replaces `parameter.grad`; under a GradScaler
                with a fused optimizer they are still scaled (`step.scale`), so stay linear.
            request: Says what to measure at this step; the answer has to be the same on all
                ranks. Without any request nothing is computed.
            decide: Says whether to skip, or what to multiply the gradients by. With several ranks
                the former answers are combined with one small reduction, so a skip on one is a skip
                on all.
            observe: Sees the step after clipping, gradients included where the step ran.
            outcome: Told exactly once per attempt whether the step was skipped; a 0-dim bool
                tensor where only the device knows.

        All are called on every rank, without autograd. What they raise stops the run.

        Raises:
            ClientConflictError: The owner is registered with other functions.
        """
        client = _Client(transform, request, decide, observe, outcome)
        if self._clients.get(owner, client) != client:
            raise ClientConflictError(
                f"gradient client {owner!r} is registered already, with other functions; owner "
                "names are unique per trainer. Give the second callback a label of its own."
            )
        # Sorted here, so that no phase has to be.
        self._clients = dict(sorted({**self._clients, owner: client}.items()))
        self._changed()

    def unregister(self, owner: str) -> None:
        """Forget the client of *owner*; nothing happens if there is none."""
        if self._clients.pop(owner, None) is not None:
            self._changed()

    @staticmethod
    def supports_device_skip(optimizer: Optimizer) -> bool:
        """Whether a tensor as `StepOutcome.skipped` skips *optimizer*'s next step with no sync.

        True for torch's fused Adam, AdamW, Adagrad and SGD (SGD with momentum from its second
        step on). For others, a tensor costs one wait for the device.
        """
        return supports_device_skip(optimizer)

    def observe_optimizers(self, trainer: Trainer) -> None:
        """Put hooks on the trainer's optimizers; call when they exist and before the first step."""
        self._trainer = trainer
        if self.active:
            for optimizer in trainer.optimizers:
                self._slot(trainer, optimizer)

    @torch.no_grad()
    def before_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Run the phases up to the decision; from Lightning's `on_before_optimizer_step`."""
        slot = self._slot(trainer, getattr(optimizer, "optimizer", optimizer))
        if slot.step is not None and slot.depth == 0:
            self._finish(slot)  # announced, never run: the GradScaler skipped it
        earlier = slot.step
        step = self._new_step(trainer, pl_module, slot)
        self._call_all("transform", step)
        step.request = GradientRequest.union(answer for _, answer in self._answers("request", step))
        step.norms = step.measure()
        self._decide(step)
        slot.step = step
        self._execute(slot, step)
        if earlier is not None and isinstance(slot.optimizer, LBFGS):
            # Weights have moved since the first evaluation; no later one can undo that.
            step.skipped, step.reasons, step.flags = earlier.skipped, earlier.reasons, earlier.flags

    @torch.no_grad()
    def finish_batch(self) -> None:
        """Settle the attempts whose end no hook reported; from `on_train_batch_end`."""
        for slot in self._observed.values():
            slot.depth = 0  # a step that raised, and was caught by the module, left it raised
            if slot.step is not None:
                self._finish(slot)

    def pending_counts(self) -> list[Tensor]:
        """Return device counts of skips not yet reported, to be fetched with other metrics."""
        return self._counts.tensors()

    def report_counts(self, trainer: Trainer, values: list[float]) -> None:
        """Emit one event for the fetched `pending_counts`, if they are not zero."""
        count, reasons = self._counts.read(values)
        if count:
            emit(trainer, ON_OPTIMIZER_STEP_SKIPPED, count, reasons)

    def reset(self) -> None:
        """Take everything off the optimizers and forget what is under way; clients stay."""
        for slot in self._observed.values():
            slot.release()
        self._observed = {}
        self._counts = SkipCounts()
        self._trainer = None

    def close(self) -> None:
        """Reset, and forget the clients."""
        self.reset()
        self._clients = {}
        self._changed()

    def _slot(self, trainer: Trainer, optimizer: Optimizer) -> ObservedOptimizer:
        slot = self._observed.get(id(optimizer))
        if slot is None:
            optimizers = trainer.optimizers
            index = next((i for i, other in enumerate(optimizers) if other is optimizer), -1)
            slot = ObservedOptimizer(optimizer, index, self._after_step)
            self._observed[id(optimizer)] = slot
            self._trainer = trainer
        return slot

    def _new_step(
        self, trainer: Trainer, pl_module: LightningModule, slot: ObservedOptimizer
    ) -> GradientStep:
        parameters, names = slot.parameters(pl_module)
        scaler = _scaler(trainer)
        scale = None
        if scaler is not None and steps_scaled_gradients(slot.optimizer):
            scale = scaler._get_scale_async()
        return GradientStep(
            trainer=trainer,
            pl_module=pl_module,
            optimizer=slot.optimizer,
            optimizer_index=slot.index,
            step=trainer.global_step,
            will_log=is_logging_step(trainer),
            parameters=parameters,
            names=names,
            scale=scale,
        )

    def _decide(self, step: GradientStep) -> None:
        if not any(client.decide for client in self._clients.values()):
            return
        outcomes: list[StepOutcome] = [o for _, o in self._answers("decide", step) if o is not None]
        step.flags = [(o.reason, o.skipped) for o in outcomes if isinstance(o.skipped, Tensor)]
        step.reasons = tuple(dict.fromkeys(o.reason for o in outcomes if o.skipped is True))
        flag = _any_flag([flag for _, flag in step.flags])
        if step.trainer.world_size > 1:
            # Unconditional, and before anything is known of this rank alone: a client that
            # answers on some ranks only must not leave the others waiting.
            flag = _agree(step, flag)
        if step.reasons:
            step.skipped = True
        elif flag is not None:
            step.skipped = flag
        coefficients = [o.coefficient for o in outcomes if o.coefficient is not None]
        if coefficients and step.skipped is not True:
            step.scale_gradients(_smallest(coefficients))

    def _execute(self, slot: ObservedOptimizer, step: GradientStep) -> None:
        if step.skipped is False or step.scale is not None:
            return  # under a GradScaler with a fused optimizer: by found_inf, just before the step
        if isinstance(step.skipped, Tensor):
            if slot.hooked and supports_device_skip(slot.optimizer):
                slot.skip_on_device(step.skipped)
                return
            step.skipped, step.reasons = _fetch(step.skipped, step.flags)
            step.flags = []
        if step.skipped:
            step.release_gradients()

    @torch.no_grad()
    def _after_step(self, slot: ObservedOptimizer) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        if slot.step is None:
            if not self.active:
                slot.ran = False  # the last client has gone, and the hooks stay for the next one
                return
            # A raw optimizer stepped past Lightning: weights have changed, so clients are told.
            step = self._new_step(trainer, trainer.lightning_module, slot)
            slot.ran = False
            self._call_all("outcome", step, step.skipped)
        else:
            self._finish(slot)

    def _finish(self, slot: ObservedOptimizer) -> None:
        step, ran = slot.step, slot.ran or not slot.hooked
        slot.step, slot.ran = None, False
        if step is None:
            return
        if not ran:
            _mark_not_run(step)
        elif slot.found_inf is not None and step.skipped is not True:
            own = slot.scaler_found_inf
            step.skipped = slot.found_inf > 0
            step.flags = [*step.flags, *([] if own is None else [(SCALER_SKIPPED, own)])]
        slot.settle()
        wants_clipped = step.request is not None and step.request.clipped
        if wants_clipped and ran and step.skipped is not True:
            step.clipped = step.measure_clipped()
        self._call_all("observe", step)
        self._call_all("outcome", step, step.skipped)
        step.released = []
        if isinstance(step.skipped, Tensor):
            self._counts.add(step.skipped, step.flags, OTHER_RANK)
        elif step.skipped:
            emit(step.trainer, ON_OPTIMIZER_STEP_SKIPPED, 1, step.reasons)

    def _call_all(self, phase: str, *args: Any) -> None:
        for _ in self._answers(phase, *args):
            pass

    def _answers(self, phase: str, *args: Any) -> Iterator[tuple[str, Any]]:
        for owner, client in self._clients.items():
            function: Callable[..., Any] | None = getattr(client, phase)
            if function is None:
                continue
            try:
                answer = function(*args)
            except Exception as error:
                name_culprit(error, f"raised in the {phase} phase of gradient client {owner!r}")
                raise
            yield owner, answer


def _scaler(trainer: Trainer) -> Any:
    """Return the precision plugin's GradScaler if it is in use."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _mark_not_run(step: GradientStep) -> None:
    """Record that no step followed: by a GradScaler that unscaled and found Inf, as a rule."""
    unscaled = _scaler(step.trainer) is not None and any(g is not None for g in step.grads)
    why = SCALER_SKIPPED if unscaled or step.skipped is True else NOT_RUN
    step.reasons = tuple(dict.fromkeys((*step.reasons, why)))
    step.skipped = True


def _any_flag(flags: list[Tensor]) -> Tensor | None:
    """Return whether any 0-dim flag is set, as a 0-dim bool tensor; `None` without flags."""
    if not flags:
        return None
    first, *others = map(_as_bool, flags)
    for other in others:
        first = first | other.to(first.device)
    return first


def _as_bool(flag: Tensor) -> Tensor:
    flag = flag.detach().reshape(())
    return flag if flag.dtype == torch.bool else flag != 0


def _smallest(coefficients: list[Tensor]) -> Tensor:
    first, *others = coefficients
    for other in others:
        first = torch.minimum(first, other.to(first.device, first.dtype))
    return first


def _agree(step: GradientStep, flag: Tensor | None) -> Tensor:
    """Return the decision that all ranks share: skip if any rank wants to."""
    device = step.trainer.strategy.root_device
    mine = torch.zeros((), device=device) if flag is None else flag.to(device, torch.float32)
    if step.reasons:
        mine = torch.ones_like(mine)
    return step.largest_over_ranks(mine) > 0


def _fetch(skipped: Tensor, flags: list[tuple[str, Tensor]]) -> tuple[bool, tuple[str, ...]]:
    """Return the decision and its reasons on the host; waits for the device once."""
    tensors = [skipped, *(flag for _, flag in flags)]
    set_flags = torch.stack([t.to(skipped.device).reshape(()) != 0 for t in tensors])
    values = cast("list[bool]", set_flags.tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
    reasons = [reason for (reason, _), value in zip(flags, values[1:], strict=True) if value]
    if values[0] and not reasons:
        reasons = [OTHER_RANK]
    return values[0], tuple(dict.fromkeys(reasons))
