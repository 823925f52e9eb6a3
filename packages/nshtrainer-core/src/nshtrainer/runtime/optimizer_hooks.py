"""One optimizer under observation: torch's step hooks, its parameters, and how a step is skipped.

A skipped step leaves weights, moments, decay and step counters as they are. Zeroed gradients
would not: moments decay and weight decay is applied. Two ways do:

- Gradients set to `None`: torch's optimizers pass over such parameters. Needs the host to know.
- `optimizer.found_inf`, which torch's fused kernels read on the device: no wait. Under a
  GradScaler a fused optimizer has to be skipped so, as without gradients the scaler fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule
    from torch.utils.hooks import RemovableHandle

    from nshtrainer.runtime.gradient_step import GradientStep

__all__ = ["ObservedOptimizer", "plain_name", "steps_scaled_gradients", "supports_device_skip"]

# Their own `step` reads `found_inf`; a subclass may override it, so the exact type counts.
_READ_FOUND_INF: Final = frozenset({Adam, AdamW, SGD, Adagrad})

_WRAPPER_PREFIXES: Final = ("_orig_mod.", "_fsdp_wrapped_module.")


def steps_scaled_gradients(optimizer: Optimizer) -> bool:
    """Whether a GradScaler leaves unscaling to *optimizer*'s own (fused) step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def supports_device_skip(optimizer: Optimizer) -> bool:
    """Whether *optimizer* can skip its next step by a flag on the device, with no host wait."""
    if type(optimizer) not in _READ_FOUND_INF or not steps_scaled_gradients(optimizer):
        return False
    return not _creates_momentum(optimizer)


def _creates_momentum(optimizer: Optimizer) -> bool:
    """Whether the next step allocates momentum: a skipped fused SGD leaves it uninitialized."""
    if not isinstance(optimizer, SGD):
        return False
    return any(
        group.get("momentum") and parameter.grad is not None and not _momentum(optimizer, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _momentum(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether *parameter* has a momentum buffer; looking must not create an entry."""
    return optimizer.state.get(parameter, {}).get("momentum_buffer") is not None


class ObservedOptimizer:
    """Hooks on one optimizer, and the attempt that is under way.

    Args:
        optimizer: With torch's step hooks or, if it has none, without (`hooked` tells).
        index: Position in `trainer.optimizers`, or -1.
        finished: Called at the end of each outermost `step` that returns.
    """

    def __init__(
        self, optimizer: Optimizer, index: int, finished: Callable[[ObservedOptimizer], None]
    ) -> None:
        self.optimizer = optimizer
        self.index = index
        self.step: GradientStep | None = None
        self.depth = 0
        """How many `step` calls are under way: subclasses that call `super().step` hook twice."""
        self.ran = False
        """Whether a `step` has returned since the attempt began."""
        self.found_inf: Tensor | None = None
        """What a fused step was told under a GradScaler."""
        self.scaler_found_inf: Tensor | None = None
        """The scaler's own part of `found_inf`."""
        self._finished = finished
        self._flag_set = False
        self._new_momentum: list[Tensor] = []
        self._ids: list[int] = []
        self._parameters: list[Tensor] = []
        self._names: list[str] = []
        self._handles: list[RemovableHandle] = []
        if isinstance(getattr(optimizer, "_optimizer_step_post_hooks", None), dict):
            self._handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    @property
    def hooked(self) -> bool:
        """Whether the end of a step is reported by torch's hooks."""
        return bool(self._handles)

    def parameters(self, pl_module: LightningModule) -> tuple[list[Tensor], list[str]]:
        """Return the optimizer's distinct tensors and their names; cached until groups change."""
        listed = [p for group in self.optimizer.param_groups for p in group["params"]]
        ids = list(map(id, listed))
        if ids != self._ids:
            known = {id(p): plain_name(name) for name, p in pl_module.named_parameters()}
            self._ids = ids
            self._parameters = list({id(p): p for p in listed}.values())
            self._names = [
                known.get(id(p), f"optimizer{self.index}.{position}")
                for position, p in enumerate(self._parameters)
            ]
        return self._parameters, self._names

    def skip_on_device(self, flag: Tensor) -> None:
        """Make the coming fused step do nothing where *flag* is non-zero."""
        self.optimizer.found_inf = flag.float()  # pyright: ignore[reportAttributeAccessIssue] -- GradScaler's protocol with fused optimizers
        self._flag_set = True

    def settle(self) -> None:
        """Forget the attempt's flags and drop the state that a skipped step left uninitialized."""
        if self._flag_set:
            self._flag_set = False
            if hasattr(self.optimizer, "found_inf"):
                del self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue] -- set in skip_on_device
        if self._new_momentum and self.found_inf is not None and bool(self.found_inf):
            for parameter in self._new_momentum:
                self.optimizer.state.pop(parameter, None)
        self._new_momentum = []
        self.found_inf = self.scaler_found_inf = None

    def release(self) -> None:
        """Take the hooks and flags off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._new_momentum = []
        self.settle()
        self.step = None

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        step = self.step
        if step is None or step.scale is None:
            return
        found = getattr(optimizer, "found_inf", None)
        if not isinstance(found, Tensor):
            # The scaler's older contract hands itself over instead of flags.
            if step.skipped is True:
                step.release_gradients()
            return
        self.scaler_found_inf = found
        if step.skipped is not False:
            flag = step.skipped if isinstance(step.skipped, Tensor) else torch.ones_like(found)
            # A new tensor: the scaler's own record must not see our decision, or it would lower
            # its scale for a gradient that did not overflow.
            found = torch.maximum(found, flag.to(found.device, found.dtype))
            optimizer.found_inf = found  # pyright: ignore[reportAttributeAccessIssue] -- as above
        self.found_inf = found
        if _creates_momentum(optimizer):
            self._new_momentum = [p for p in step.parameters if not _momentum(optimizer, p)]

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran = True
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            self._finished(self)


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of compiled and wrapped modules."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
