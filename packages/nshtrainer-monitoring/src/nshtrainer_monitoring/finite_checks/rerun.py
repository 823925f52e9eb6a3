"""Finds the module that produced a NaN or Inf, by running the batches of a step once more."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import signature_utils
from torch import nn

from nshtrainer.runtime.optimizer_hooks import plain_name

from .batches import MicroBatch, tensors_in
from .preserving import logging_nothing, parameters_unchanged, unchanged
from .rng import RandomState
from .stepping import StandIn, StepReached, taking_no_steps

# Partially typed in Lightning.
_signatures: Any = signature_utils

__all__ = ["Origin", "find_origin", "obstacle_to"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a value arose, as far as a second run shows."""

    text: str
    """For people, a whole sentence."""
    module: str | None = None
    """Name of the first module with an output that is not finite; empty for the LightningModule."""
    batch_idx: int | None = None
    """The batch in which that happened."""


def obstacle_to(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Return why batches cannot be run again, None if they can."""
    if _signatures.is_param_in_hook_signature(
        pl_module.training_step, "dataloader_iter", explicit=True
    ):
        return "training_step takes its batches from dataloader_iter"
    strategy: Any = trainer.strategy
    if strategy.model is not pl_module and not isinstance(strategy, DDPStrategy):
        return f"{type(strategy).__name__} runs the module in a way of its own"
    return None


def find_origin(
    trainer: Trainer, pl_module: LightningModule, batches: Sequence[MicroBatch]
) -> Origin:
    """Run *batches* again, forward only, and return the first place with a NaN or Inf.

    In manual optimization the last of *batches* is run up to the step that is about to be taken, and
    the steps, backward passes and schedules before it are passed over.

    Parameters, gradients, buffers, metrics and random states are afterwards what they were, and
    nothing is logged. Hooks are on the modules while this runs. With several ranks all must call,
    with as many batches each, since modules may talk to those of other ranks.

    Waits for the device after each module. What the module raises is part of the answer.
    """
    obstacle = obstacle_to(trainer, pl_module)
    if obstacle is not None:
        return Origin(f"The batch was not run again: {obstacle}.")
    before = RandomState.take(trainer.strategy.root_device)
    steps = trainer.global_step - batches[-1].global_step if batches else 0
    manual = (
        contextlib.nullcontext()
        if pl_module.automatic_optimization
        else taking_no_steps(trainer, pl_module)
    )
    origins: list[Origin] = []
    try:
        with (
            unchanged(pl_module),
            parameters_unchanged(pl_module),
            logging_nothing(trainer, pl_module),
            _eager(),
            manual as stand_in,
        ):
            for batch in batches:
                if stand_in is not None:
                    stand_in.begin(batch.global_step, steps if batch is batches[-1] else None)
                origins.append(_run(trainer, pl_module, batch, stand_in))
                if origins[-1].batch_idx is not None and trainer.world_size == 1:
                    break
    except Exception as error:  # whatever the user's module raises, the finding is what matters
        log.debug("running a batch again failed", exc_info=True)
        return Origin(f"The batch could not be run again: {type(error).__name__}: {error}.")
    finally:
        before.put_back()
    found = [origin for origin in origins if origin.batch_idx is not None]
    if found:
        return _with_steps(found[0], steps)
    elsewhere = " on this rank" if trainer.world_size > 1 else ""
    return Origin(
        f"Run again, the outputs of all modules and the loss are finite{elsewhere}: the value arises "
        "in the backward pass, or the forward pass is not the same each time."
    )


def _with_steps(origin: Origin, steps: int) -> Origin:
    """Say what was not as in the first run if the batch had taken *steps* before this one."""
    if not steps:
        return origin
    before = "1 step" if steps == 1 else f"{steps} steps"
    note = (
        f"The batch had taken {before} before; this time all of it ran with the weights after that."
    )
    return dataclasses.replace(origin, text=f"{origin.text} {note}")


class _Watch:
    """Notes the first output that is not finite."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.kind = ""
        self.is_source = False

    def hook(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.name is None and not _is_finite(output):
                self.name, self.kind = name, type(module).__name__
                self.is_source = _is_finite((args, kwargs))

        return after


def _run(
    trainer: Trainer, pl_module: LightningModule, batch: MicroBatch, stand_in: StandIn | None
) -> Origin:
    watch = _Watch()
    handles = [
        part.register_forward_hook(watch.hook(plain_name(name)), with_kwargs=True)
        for name, part in cast("Iterator[tuple[str, nn.Module]]", pl_module.named_modules())
    ]
    takes_index = _signatures.is_param_in_hook_signature(
        pl_module.training_step, "batch_idx", min_args=2
    )
    output: Any = None
    try:
        batch.random.put_back()
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            indices = (batch.batch_idx,) if takes_index else ()
            output = pl_module.training_step(batch.batch, *indices)
    except StepReached:
        pass
    except Exception:  # code that misses a gradient, for example, comes after what is looked for
        if watch.name is None:
            raise
    finally:
        for handle in handles:
            handle.remove()
    return _described(watch, batch, output if stand_in is None else stand_in.losses)


def _described(watch: _Watch, batch: MicroBatch, output: Any) -> Origin:
    where = f"batch {batch.batch_idx}"
    bad = [path for path, tensor in tensors_in(batch.batch) if not _is_finite(tensor)]
    if bad:
        where += f", which itself has NaN or Inf{' at ' if bad[0] else ''}{', '.join(bad[:3])}"
    if watch.name is not None:
        source = "finite" if watch.is_source else "not finite either"
        name = f"{watch.name!r} ({watch.kind})" if watch.name else f"the {watch.kind} itself"
        return Origin(
            f"Run again, the first module with NaN or Inf in its output is {name}, in {where}; its "
            f"input is {source}.",
            watch.name,
            batch.batch_idx,
        )
    if not _is_finite(output):
        text = f"Run again, the outputs of all modules are finite and the loss is not, in {where}."
        return Origin(text, None, batch.batch_idx)
    return Origin("")


def _is_finite(value: Any) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for _, tensor in tensors_in(value)
        if tensor.is_floating_point() or tensor.is_complex()
    )


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Have compiled modules run as they are written: what is compiled calls no new hooks."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: Any = torch.compiler.set_stance
    return stance("force_eager")
