"""The arithmetic of the average: which tensors it has, and how one optimizer step moves it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nshtrainer.errors import NshTrainerError

__all__ = ["UnsupportedParameterError", "WeightAverage", "update_average"]

log = logging.getLogger(__name__)

# Private in torch; there is no public form of the foreach functions.
_torch: Any = torch

_PIECE = 1 << 22
"""How many elements are cast to the average's dtype at a time: 16 MiB in fp32."""


class UnsupportedParameterError(NshTrainerError, TypeError):
    """A parameter cannot be averaged."""


def update_average(
    average: list[Tensor], source: list[Tensor], decay: float, *, where: Tensor | None = None
) -> None:
    """Move *average* toward *source* in place: `average = decay*average + (1-decay)*source`.

    Args:
        average: Tensors to update.
        source: Same length and shapes; read only. Where dtype or device differ, they are copied a
            piece at a time.
        decay: In [0, 1].
        where: 0-dim bool tensor: False leaves *average* as it is. Costs no synchronization.

    Runs without communication; call it without autograd.

    Source: Polyak and Juditsky 1992, https://doi.org/10.1137/0330046.
    """
    pairs = list(zip(average, source, strict=True))
    alike = [(a, s) for a, s in pairs if a.dtype == s.dtype and a.device == s.device]
    _lerp(alike, 1 - decay, where)
    if len(alike) < len(pairs):
        others = [(a, s) for a, s in pairs if a.dtype != s.dtype or a.device != s.device]
        for piece in _pieces(others):
            _lerp([(a, s.to(a.device, a.dtype)) for a, s in piece], 1 - decay, where)


def _pieces(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield *pairs* in runs of about `_PIECE` elements, so that few are held twice at a time."""
    piece: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        piece.append(pair)
        size += pair[0].numel()
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _lerp(pairs: list[tuple[Tensor, Tensor]], weight: float, where: Tensor | None) -> None:
    if not pairs:
        return
    average, source = [a for a, _ in pairs], [s for _, s in pairs]
    if where is None:
        _torch._foreach_lerp_(average, source, weight)
        return
    # One tensor for each pair: a single one would be read by the host.
    kinds = {(a.device, a.dtype) for a in average}
    weights = {kind: where.to(*kind) * weight for kind in kinds}
    _torch._foreach_lerp_(average, source, [weights[a.device, a.dtype] for a in average])


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
        are now; lazy ones, which have no values before the first forward pass, when it is called
        again (`tracks` says so).

        Raises:
            UnsupportedParameterError: A parameter is split over processes.
        """
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        is_complete = not any(is_lazy(parameter) for parameter in parameters)
        group = _Group(listed=parameters if is_complete else [])
        for parameter in parameters:
            name = names.get(id(parameter))
            if (
                name is None
                or is_lazy(parameter)
                or not (parameter.requires_grad or name in self.averages)
            ):
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
        due = self._count(index, skipped)
        if due is not False:
            where = None if due is True else due
            update_average(group.averages, group.weights, self.decay, where=where)

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

    def _count(self, index: int, skipped: bool | Tensor) -> bool | Tensor:
        """Count the step if it was applied; return whether the average is to move."""
        steps = self._steps[index]
        if skipped is True:
            return False
        if skipped is False and not isinstance(steps, Tensor):
            self._steps[index] = steps + 1
            return (steps + 1) % self.every_n_steps == 0
        # The count moves to the device and stays there: the host does not know it any more.
        applied = ~skipped.bool() if isinstance(skipped, Tensor) else True
        steps = self._steps[index] = steps + applied
        due = torch.as_tensor(steps) % self.every_n_steps == 0
        return due & applied


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
