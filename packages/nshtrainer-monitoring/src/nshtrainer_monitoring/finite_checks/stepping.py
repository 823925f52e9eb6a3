"""Running a `training_step` that optimizes manually without a step being taken."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .preserving import replaced

__all__ = ["StandIn", "StepReached", "taking_no_steps"]


class StepReached(BaseException):
    """The run has come to the step that is to be explained."""


class StandIn:
    """Stands in for what changes things in manual optimization.

    Attributes:
        losses: What backward passes were asked for of.
        last: How many steps are passed over; the next one ends the run. None passes over all.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.losses: list[Tensor] = []
        self.last: int | None = None
        self._module = trainer.lightning_module
        self._total = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total

    def begin(self, global_step: int, last: int | None) -> None:
        """Begin a batch at *global_step*, and end it at its step number *last*, from 0."""
        self.losses = []
        self.last = last
        self._total.completed = global_step

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Run *closure*, as a step does; `LightningOptimizer.step`."""
        result = None if closure is None else closure()
        if self.last == 0:
            raise StepReached
        if self.last is not None:
            self.last -= 1
        self._total.completed += 1  # of which `global_step` is made
        return result

    def backward(self, tensors: Any, *_: Any, **__: Any) -> None:
        """Note the loss; `torch.autograd.backward` and `LightningModule.manual_backward`."""
        several = cast(
            "Sequence[Any]", tensors if isinstance(tensors, (list, tuple)) else [tensors]
        )
        self.losses += [tensor.detach() for tensor in several if isinstance(tensor, Tensor)]
        for parameter in self._module.parameters():  # for a module that clips them itself
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


@contextlib.contextmanager
def taking_no_steps(trainer: Trainer, pl_module: LightningModule) -> Generator[StandIn]:
    """Let optimizers, schedules and backward passes do nothing inside the block.

    It begins with no optimizer toggled. `global_step` counts as in the first run, and is afterwards
    what it was.
    """
    stand_in = StandIn(trainer)
    total = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    completed, thread, backward = total.completed, threading.get_ident(), torch.autograd.backward

    def recorded(*args: Any, **kwargs: Any) -> None:
        ours = threading.get_ident() == thread
        (stand_in.backward if ours else backward)(*args, **kwargs)

    strategy: Any = trainer.strategy
    with contextlib.ExitStack() as stack:
        for optimizer in strategy._lightning_optimizers:
            stack.enter_context(replaced(optimizer, step=stand_in.step, zero_grad=_nothing))
        for optimizer in trainer.optimizers:
            stack.enter_context(replaced(optimizer, step=_nothing, zero_grad=_nothing))
        for config in trainer.lr_scheduler_configs:
            stack.enter_context(replaced(config.scheduler, step=_nothing))
        stack.enter_context(replaced(pl_module, manual_backward=stand_in.backward))
        stack.enter_context(replaced(torch.autograd, backward=recorded))
        toggled: dict[Tensor, bool] = getattr(pl_module, "_param_requires_grad_state", {})
        for parameter, requires_grad in toggled.items():
            parameter.requires_grad = requires_grad
        try:
            yield stand_in
        finally:
            total.completed = completed


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that changes something."""
