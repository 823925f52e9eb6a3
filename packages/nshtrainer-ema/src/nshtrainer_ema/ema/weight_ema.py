"""`WeightEMA`: the averages of one module's weights, without Lightning."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nshtrainer.errors import NshTrainerError
from nshtrainer.runtime.weights import WeightSwap
from nshtrainer.selection import NameSelection

from .averaging import Averaging, Workspace, update_average
from .options import AverageOptions
from .plan import pack
from .schedule import DecaySchedule, schedules_of
from .selection import BufferSlot, ModuleContent, buffer_slots
from .shards import is_sharded, like, local

__all__ = ["UnsupportedParameterError", "WeightEMA"]

log = logging.getLogger(__name__)

_VERSION = 1


class UnsupportedParameterError(NshTrainerError, TypeError):
    """A parameter cannot be averaged."""


@dataclass
class _Average:
    """One average: its schedule, and its tensors by name."""

    schedule: DecaySchedule
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass
class _Group:
    """What the step of one optimizer moves."""

    listed: list[Tensor] = field(default_factory=list[Tensor])
    """The optimizer's parameters, as the list that it was made from."""
    weights: list[Tensor] = field(default_factory=list[Tensor])
    is_sharded: bool = False
    averages: list[Averaging] = field(default_factory=list[Averaging])
    """For each average, its tensors for `weights`."""


@dataclass
class _Count:
    """How far one optimizer is; numbers on the device where only that knows which steps ran."""

    steps: int | Tensor = 0
    samples: float | Tensor = 0.0
    """Since the last update."""

    def add(self, skipped: bool | Tensor, samples: float, every: int) -> bool | Tensor:
        """Count a step if it was applied; return whether an update is due."""
        if skipped is True:
            return False
        if skipped is False and not isinstance(self.steps, Tensor):
            self.steps += 1
            self.samples += samples
            return self.steps % every == 0
        # The counts move to the device and stay there: the host does not know them any more.
        applied: Tensor | bool = True
        if isinstance(skipped, Tensor):
            applied = ~(skipped if skipped.dtype == torch.bool else skipped.bool())
        self.steps = self.steps + applied
        if samples or isinstance(self.samples, Tensor):
            self.samples = self.samples + samples * applied
        if every == 1:
            return applied
        return (torch.as_tensor(self.steps) % every == 0) & applied

    def updated(self, due: bool | Tensor) -> None:
        """Begin to count samples anew after an update."""
        if isinstance(due, Tensor) and isinstance(self.samples, Tensor):
            self.samples = torch.where(due, 0.0, self.samples)
        elif due is True:
            self.samples = 0.0


class WeightEMA:
    """Exponential moving averages of a module's weights.

        ema = WeightEMA(model, decay=0.999)
        for batch in data:
            ...
            optimizer.step()
            ema.update()
        with ema.applied():
            evaluate(model)

    An average begins as the weights are when they are first seen; parameters that need no gradient
    are left as they are until they need one. Weights below float32 have theirs in float32. A tied
    parameter has one average. Sharded parameters (DTensor, FSDP2) are averaged shard by shard, with
    no communication. Memory: one number for each averaged weight and average.

    Args:
        module: The module; kept by a weak reference. It may be wrapped or compiled later, but a
            parameter that is replaced by another object has to be seen by `update` first.
        options: How to average.
        fields: Its fields, if no options are given.

    Raises:
        pydantic.ValidationError: An option does not fit.
        ConfigError: A glob matches nothing.
        UnsupportedParameterError: A parameter is split over processes in a way that hides its shard.

    Source: Polyak and Juditsky 1992, https://doi.org/10.1137/0330046.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        options: AverageOptions | None = None,
        **fields: Any,
    ) -> None:
        if options is not None and fields:
            raise TypeError("give AverageOptions or their fields as keywords, not both")
        self.options = AverageOptions.model_validate(fields) if options is None else options
        self.selection = NameSelection(
            self.options.include, self.options.exclude, owner="ema", what="parameter or buffer"
        )
        self._averages = {
            label: _Average(schedule) for label, schedule in schedules_of(self.options).items()
        }
        self._counts: dict[int, _Count] = {}
        self._groups: dict[int, _Group] = {}
        self._slots: list[BufferSlot] | None = None
        self._content: ModuleContent | None = None
        """Of the module that is followed, when it was tracked."""
        self._workspace = Workspace()
        self._swap = WeightSwap()
        self._module: weakref.ref[nn.Module] | None = None
        if module is not None:
            self._module = weakref.ref(module)
            self.check(module)
            self._follow(module)

    def __getstate__(self) -> dict[str, Any]:
        """Take the averages along, and nothing that belongs to this process or module."""
        state = self.__dict__.copy()
        state.update(_swap=WeightSwap(), _workspace=Workspace())
        state.update(_module=None, _groups={}, _slots=None, _content=None)
        return state

    # ---- as a user of plain PyTorch sees it ------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """Names of the averages; the first is the one that is evaluated."""
        return list(self._averages)

    @property
    def averages(self) -> dict[str, Tensor]:
        """Parameter or buffer name to average, of the first one; live tensors, to be read only."""
        return self.of(self.labels[0])

    def of(self, label: str) -> dict[str, Tensor]:
        """The average with *label*, such as `decay=0.99`; live tensors, to be read only."""
        return dict(self._averages[label].tensors)

    @property
    def steps(self) -> dict[int, int]:
        """Applied steps by optimizer index; may wait for the device."""
        return {index: int(count.steps) for index, count in self._counts.items()}

    @torch.no_grad()
    def update(
        self, index: int = 0, skipped: bool | Tensor = False, *, samples: float | None = None
    ) -> None:
        """Account for one optimizer step, after it.

        Args:
            index: Which optimizer, where several step at different times (`track`).
            skipped: Whether the step changed nothing; a 0-dim bool tensor where only the device
                knows, which costs no synchronization (but for an average that is offloaded).
            samples: In the step's batches, of all ranks; for a half-life in samples.

        Raises:
            ValueError: A half-life in samples, and no *samples*.
        """
        if self.options.half_life_samples is not None and samples is None:
            raise ValueError("`half_life_samples` needs `update(samples=...)` at each step")
        if self._module is not None and (module := self._module()) is not None:
            self._follow(module)
        group, count = self._groups.get(index), self._counts.get(index)
        if group is None or count is None:
            return
        if isinstance(skipped, Tensor) and self.options.cpu_offload:
            skipped = bool(skipped)
        every = self.options.every_n_steps
        due = count.add(skipped, samples or 0.0, every)
        if due is False:
            return
        where = None if due is True else due
        weights = list(map(local, group.weights)) if group.is_sharded else group.weights
        for position, average in enumerate(self._averages.values()):
            decay = average.schedule.of_update(count.steps, count.samples)
            group.averages[position].move(weights, decay, where)
            if self._moves_buffers(index):
                self._update_buffers(average, decay, where)
        count.updated(due)

    def applied(self) -> WeightSwap:
        """Let the module hold the average inside a `with` block; see `WeightSwap`.

        Raises:
            RuntimeError: The module is gone.
        """
        module = self._module() if self._module is not None else None
        if module is None:
            raise RuntimeError("the module that was averaged does not exist any more")
        return self.swap_in(module)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into *module*, for good."""
        for _, tensor, average in self.pairs(module):
            local(tensor).copy_(local(average))

    def state_dict(self) -> dict[str, Any]:
        """Averages and counts; tensors are live ones."""
        return {
            "version": _VERSION,
            "averages": {label: dict(a.tensors) for label, a in self._averages.items()},
            "steps": self.steps,
            "samples": self.samples,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from copies of what `state_dict` gave; averages with other labels begin anew."""
        if state_dict["version"] != _VERSION:
            raise ValueError(
                f"the state has format version {state_dict['version']}, and this nshtrainer-ema "
                f"reads version {_VERSION}; update nshtrainer-ema to load it"
            )
        self.restore(state_dict["averages"], state_dict["steps"], state_dict["samples"])
        if self._module is not None and (module := self._module()) is not None:
            self._follow(module)

    # ---- for those who know when which optimizer steps -------------------------------------------

    @property
    def samples(self) -> dict[int, float]:
        """Samples since the last update by optimizer index; may wait for the device."""
        return {index: float(count.samples) for index, count in self._counts.items()}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is averaged yet."""
        return not any(average.tensors for average in self._averages.values())

    def check(self, module: nn.Module) -> None:
        """Refuse globs that match nothing in *module*.

        Raises:
            ConfigError: There is one.
        """
        names = [name for name, _ in module.named_parameters()]
        self.selection.check([*names, *(name for name, _ in module.named_buffers())])

    def clear(self) -> None:
        """Forget everything: the averages begin anew."""
        self._counts, self._groups, self._slots = {}, {}, None
        for average in self._averages.values():
            average.tensors = {}

    def restore(
        self,
        averages: Mapping[str, Mapping[str, Tensor]],
        steps: Mapping[int, int],
        samples: Mapping[int, float],
    ) -> None:
        """Continue from copies of *averages*, by label, and from these counts."""
        self.clear()
        for label, average in self._averages.items():
            known = averages.get(label, {})
            average.tensors = {name: t.detach().clone() for name, t in known.items()}
        self._counts = {i: _Count(steps[i], samples.get(i, 0.0)) for i in steps}

    def release(self) -> None:
        """Let go of the parameters; the averages stay."""
        self._groups, self._slots = {}, None

    def tracks(self, index: int, parameters: list[Tensor]) -> bool:
        """Whether the last `track` of optimizer *index* was of this very list."""
        group = self._groups.get(index)
        return group is not None and group.listed is parameters

    @torch.no_grad()
    def track(self, index: int, parameters: list[Tensor], module: nn.Module) -> None:
        """Let steps of optimizer *index* move the averages of *parameters*.

        Those that need no gradient, are not the module's or not selected are left out. New ones
        begin as they are now; lazy ones, which have no values before the first forward pass, when
        it is called again (`tracks` says so).

        Raises:
            UnsupportedParameterError: A parameter is split over processes in a way that hides its
                shard.
        """
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        is_complete = not any(is_lazy(parameter) for parameter in parameters)
        group = _Group(listed=parameters if is_complete else [])
        tracked: list[str] = []
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None or name not in self.selection or is_lazy(parameter):
                continue
            if not (parameter.requires_grad or name in self.averages):
                continue
            _check_shard(name, parameter)
            tracked.append(name)
            group.weights.append(parameter)
            group.is_sharded |= is_sharded(parameter)
        for average in self._averages.values():
            tensors = [
                self._tensor_of(average, name, weight)
                for name, weight in zip(tracked, group.weights, strict=True)
            ]
            if not group.is_sharded:
                tensors = self._pack(average, tracked, tensors, group.weights)
            group.averages.append(Averaging(list(map(local, tensors)), self._workspace))
        self._groups[index] = group
        self._counts.setdefault(index, _Count())
        self._track_buffers(module)

    def pairs(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, tensor of *module* and average; each parameter, then each buffer, once."""
        yield from self._parameter_pairs(module)
        yield from self._buffer_pairs(module)

    def swap_in(
        self, module: nn.Module, *, outermost: nn.Module | None = None, allow_pointer: bool = True
    ) -> WeightSwap:
        """Let *module* hold the average until `swap_out`; nothing happens if there is none.

        Args:
            module: The averaged module, or a copy of it.
            outermost: What wraps it (`trainer.strategy.model`), under FSDP.
            allow_pointer: False copies; compiled code and CUDA graphs may know addresses.
        """
        pairs = list(self._parameter_pairs(module))
        # What evaluation writes into a buffer must not reach the average.
        pairs += [(n, buffer, value.clone()) for n, buffer, value in self._buffer_pairs(module)]
        return self._swap.swap_in(
            [tensor for _, tensor, _ in pairs],
            [value for _, _, value in pairs],
            module=outermost,
            allow_pointer=allow_pointer,
        )

    def swap_out(self) -> None:
        """Bring the weights back; again does nothing."""
        self._swap.swap_out()

    @property
    def swapped(self) -> bool:
        """Whether the module holds the average."""
        return self._swap.active

    def trained(self, module: nn.Module) -> dict[str, Tensor]:
        """Name to what training works with, wherever that is at the moment."""
        pairs = list(self.pairs(module))
        own = self._swap.originals if self._swap.active else [t.detach() for _, t, _ in pairs]
        return dict(zip((name for name, _, _ in pairs), own, strict=True))

    def dtype_of(self, tensor: Tensor, part: str = "average") -> torch.dtype:
        """The dtype of the average of *tensor*; of `part="weights"`, its own."""
        if part == "weights" or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.dtype
        if self.options.dtype is None or tensor.is_complex():
            return torch.promote_types(tensor.dtype, torch.float32)
        return getattr(torch, self.options.dtype)

    @torch.no_grad()
    def follow_devices(self, module: nn.Module) -> None:
        """Move the averages to where the tensors are, unless they are offloaded."""
        if self.options.cpu_offload:
            return
        devices = {name: tensor.device for name, tensor, _ in self.pairs(module)}
        for average in self._averages.values():
            for name, device in devices.items():
                if name in average.tensors:
                    average.tensors[name] = average.tensors[name].to(device)

    # ---- within --------------------------------------------------------------------------------

    def _parameter_pairs(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        averages = self._averages[self.labels[0]].tensors
        for name, parameter in module.named_parameters():
            if (average := averages.get(name)) is not None:
                yield name, parameter, average

    def _buffer_pairs(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.options.buffers == "keep":
            return
        averages = self._averages[self.labels[0]].tensors
        for name, buffer in module.named_buffers():
            if (average := averages.get(name)) is not None:
                yield name, buffer, average

    def _follow(self, module: nn.Module) -> None:
        """Track what needs a gradient in *module* by now."""
        group = self._groups.get(0)
        if group is None or self._content is None or not self._content.is_of(module):
            wanted = [p for p in module.parameters() if p.requires_grad]
            kept = [p for n, p in module.named_parameters() if n in self.averages]
            listed = {id(p): p for p in [*wanted, *kept]}
            self.track(0, list(listed.values()), module)
            is_complete = bool(self._groups[0].listed) or not listed
            self._content = ModuleContent(module) if is_complete else None

    def _tensor_of(self, average: _Average, name: str, tensor: Tensor) -> Tensor:
        dtype = self.dtype_of(tensor)
        device = torch.device("cpu") if self.options.cpu_offload else tensor.device
        known = average.tensors.get(name)
        if known is not None and known.shape == tensor.shape:
            found = like(known, tensor).to(device, dtype)
        else:
            if known is not None:
                log.warning("%s has another shape than its average, which begins anew", name)
            found = tensor.detach().to(device, dtype, copy=True)
        average.tensors[name] = found
        return found

    def _pack(
        self, average: _Average, names: list[str], tensors: list[Tensor], weights: list[Tensor]
    ) -> list[Tensor]:
        packed = pack(tensors, weights)
        moved = {n for n, old, new in zip(names, tensors, packed, strict=True) if old is not new}
        average.tensors.update(zip(names, packed, strict=True))
        if moved:
            # Another optimizer may step one of them: it has to look for them again.
            for group in self._groups.values():
                group.listed = []
        return packed

    def _track_buffers(self, module: nn.Module) -> None:
        if self._slots is not None or self.options.buffers == "keep":
            return
        self._slots = list(buffer_slots(module, self.selection))
        for average in self._averages.values():
            for slot in self._slots:
                self._tensor_of(average, slot.name, slot.tensor)

    def _moves_buffers(self, index: int) -> bool:
        """Buffers belong to no optimizer; they move with the first one that is tracked."""
        return bool(self._slots) and index == min(self._groups)

    def _update_buffers(
        self, average: _Average, decay: float | Tensor, where: Tensor | None
    ) -> None:
        averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        for slot in self._slots or ():
            mean = self.options.buffers == "average" and slot.is_averaged
            pairs = averaged if mean else copied
            pairs[0].append(local(average.tensors[slot.name]))
            pairs[1].append(local(slot.tensor))
        update_average(*averaged, decay, where=where)
        for target, source in zip(*copied, strict=True):
            target.copy_(source if where is None else torch.where(where, source, target))


def _check_shard(name: str, parameter: Tensor) -> None:
    for attribute, what in (
        ("_fsdp_flattened", "a part of an FSDP parameter"),
        ("ds_id", "a DeepSpeed parameter"),
    ):
        if hasattr(parameter, attribute):
            raise UnsupportedParameterError(
                f"the parameter {name!r} is {what}, whose shard cannot be averaged by itself. Use "
                "FSDP2 (ModelParallelStrategy) or ddp, or take the callback ema out."
            )
