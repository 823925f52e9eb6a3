"""The arithmetic of the average: which tensors it has, and how one optimizer step moves it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nshtrainer.errors import NshTrainerError

__all__ = ["UnsupportedParameterError", "WeightAverage", "update_average"]

log = logging.getLogger(__name__)

# Private in torch; there is no public form of the foreach functions.
_torch: Any = torch

_CHUNK = 1 << 22
"""How many elements are cast to the average's dtype at a time: 16 MiB in fp32."""


class UnsupportedParameterError(NshTrainerError, TypeError):
    """A parameter cannot be averaged."""


def update_average(average: list[Tensor], source: list[Tensor], weight: float | Tensor) -> None:
    """Move *average* toward *source* in place: `average += weight * (source - average)`.

    Args:
        average: Tensors to update.
        source: Same length and shapes; read only. Where dtype or device differ, they are copied a
            piece at a time.
        weight: In [0, 1]; a 0-dim tensor on the device of *average* costs no synchronization.

    Without communication; call it without autograd.
    """
    same = [a.dtype == s.dtype and a.device == s.device for a, s in zip(average, source, strict=True)]
    if all(same):
        _lerp(average, source, weight)
        return
    for is_same in (True, False):
        chunk: tuple[list[Tensor], list[Tensor]] = ([], [])
        size = 0
        for a, s, same_kind in zip(average, source, same, strict=True):
            if same_kind is not is_same:
                continue
            chunk[0].append(a)
            chunk[1].append(s if is_same else s.to(a.device, a.dtype))
            size += 0 if is_same else a.numel()
            if size >= _CHUNK:
                _lerp(*chunk, weight)
                chunk, size = ([], []), 0
        _lerp(*chunk, weight)


def _lerp(average: list[Tensor], source: list[Tensor], weight: float | Tensor) -> None:
    if not average:
        return
    if isinstance(weight, Tensor):
        # As a single argument a tensor would be read by the host.
        _torch._foreach_lerp_(average, source, [weight.to(a.dtype) for a in average])
    else:
        _torch._foreach_lerp_(average, source, weight)


@dataclass
class _Group:
    """What the step of one optimizer moves."""

    listed: list[Tensor] = field(default_factory=list[Tensor])
    """The optimizer's parameters, as the list that it was made from."""
    weights: list[Tensor] = field(default_factory=list[Tensor])
    averages: list[Tensor] = field(default_factory=list[Tensor])


class WeightAverage:
    """The average of the trained parameters of one module, each kept once, by name.

    It begins as the parameters are when they are first tracked. Weights below fp32 have their
    average in fp32, since `decay=0.999` cannot move a bf16 number.

    Args:
        decay: In [0, 1].
        every_n_steps: Applied steps of an optimizer between two updates.
        offload: Keep the average in main memory.
    """

    def __init__(self, decay: float, every_n_steps: int, *, offload: bool) -> None:
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.offload = offload
        self.averages: dict[str, Tensor] = {}
        """Parameter name to average; a tied parameter has one name."""
        self._steps: dict[int, int | Tensor] = {}
        self._groups: dict[int, _Group] = {}

    @property
    def steps(self) -> dict[int, int]:
        """Applied steps by optimizer index; may wait for the device."""
        return {index: int(count) for index, count in self._steps.items()}

    def clear(self) -> None:
        """Forget everything: the average begins anew."""
        self.averages, self._steps, self._groups = {}, {}, {}

    def restore(self, averages: Mapping[str, Tensor], steps: Mapping[int, int]) -> None:
        """Continue from copies of *averages* and from *steps*."""
        self.clear()
        self.averages = {name: tensor.detach().clone() for name, tensor in averages.items()}
        self._steps = dict(steps)

    def release(self) -> None:
        """Let go of the parameters; the averages stay."""
        self._groups = {}

    def tracks(self, index: int, parameters: list[Tensor]) -> bool:
        """Whether the last `track` of optimizer *index* was of this very list."""
        group = self._groups.get(index)
        return group is not None and group.listed is parameters

    @torch.no_grad()
    def track(self, index: int, parameters: list[Tensor], module: nn.Module) -> None:
        """Let steps of optimizer *index* move the averages of *parameters*.

        Those that need no gradient, or are not the module's, are left out. New ones begin as they
        are now.

        Raises:
            UnsupportedParameterError: A parameter is split over processes.
        """
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        group = _Group(listed=parameters)
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None or not (parameter.requires_grad or name in self.averages):
                continue
            _check_whole(name, parameter)
            group.weights.append(parameter)
            group.averages.append(self._average_of(name, parameter))
        self._groups[index] = group
        self._steps.setdefault(index, 0)

    @torch.no_grad()
    def update(self, index: int, skipped: bool | Tensor) -> None:
        """Account for one step of optimizer *index*, after it.

        Args:
            index: As given to `track`.
            skipped: Whether the step changed nothing; a 0-dim bool tensor where only the device
                knows, which costs no synchronization (but for an average that is offloaded).
        """
        group = self._groups.get(index)
        if group is None:
            return
        if isinstance(skipped, Tensor) and self.offload:
            skipped = bool(skipped)
        weight = self._weight(index, skipped)
        if weight is not None:
            update_average(group.averages, group.weights, weight)

    def pairs(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield name, parameter and average, each parameter of *module* once."""
        for name, parameter in module.named_parameters():
            if (average := self.averages.get(name)) is not None:
                yield name, parameter, average

    @torch.no_grad()
    def follow_devices(self, module: nn.Module) -> None:
        """Move the averages to where the parameters are, unless they are offloaded."""
        if not self.offload:
            for name, parameter, average in list(self.pairs(module)):
                self.averages[name] = average.to(parameter.device)

    def _average_of(self, name: str, parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        device = torch.device("cpu") if self.offload else parameter.device
        known = self.averages.get(name)
        if known is not None and known.shape == parameter.shape:
            average = known.to(device, dtype)
        else:
            if known is not None:
                log.warning("%s has another shape than its average, which begins anew", name)
            average = parameter.detach().to(device, dtype, copy=True)
        self.averages[name] = average
        return average

    def _weight(self, index: int, skipped: bool | Tensor) -> float | Tensor | None:  # noqa: FBT001 -- as in update
        """Count the step; return how far to go to the weights, None for not at all."""
        steps = self._steps[index]
        if not isinstance(skipped, Tensor) and not isinstance(steps, Tensor):
            if skipped:
                return None
            self._steps[index] = steps + 1
            return 1 - self.decay if (steps + 1) % self.every_n_steps == 0 else None
        if skipped is True:
            return None
        applied: Tensor | int = ~skipped.bool() if isinstance(skipped, Tensor) else 1
        # The count moves to the device and stays there: the host does not know it any more.
        steps = steps + applied
        self._steps[index] = steps
        due = applied * (steps % self.every_n_steps == 0)
        return due * torch.tensor(1 - self.decay, dtype=torch.float64).to(due) if False else due  # placeholder


def _check_whole(name: str, parameter: Tensor) -> None:
    for attribute, what in (
        ("placements", "a DTensor"),
        ("_fsdp_flattened", "a part of an FSDP parameter"),
        ("ds_id", "a DeepSpeed parameter"),
    ):
        if hasattr(parameter, attribute):
            raise UnsupportedParameterError(
                f"the parameter {name!r} is {what}, which is split over processes; the average is "
                "of whole parameters. Use a strategy that keeps them whole, such as ddp, or take "
                "the callback ema out."
            )


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return *tensors*, each once, in order."""
    return list({id(tensor): tensor for tensor in tensors}.values())
