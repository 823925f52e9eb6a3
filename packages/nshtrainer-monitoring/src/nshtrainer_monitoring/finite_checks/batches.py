"""The batches of a step: kept until it is over, searched for tensors, turned into plain data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .rng import RandomState

__all__ = ["MicroBatch", "plain", "tensors_in"]

_LONGEST_TEXT = 200
_DEEPEST = 16


@dataclass(frozen=True)
class MicroBatch:
    """A batch as `training_step` got it, and the random states and the step of that moment."""

    batch: Any
    batch_idx: int
    random: RandomState
    global_step: int


def tensors_in(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in *value* with their places, such as `['x'][0]`, in order."""
    if isinstance(value, Tensor):
        yield path, value
    elif depth < _DEEPEST:
        for place, inner in _parts(value):
            yield from tensors_in(inner, path + place, depth + 1)


def plain(value: Any, depth: int = 0) -> Any:
    """Return *value* as data that `torch.load(weights_only=True)` reads.

    Tensors are copied to the CPU. Objects with fields become dictionaries; of what is left, the
    first characters of its `repr`.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        whole = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
        return whole.to("cpu", copy=True)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth >= _DEEPEST:
        return repr(value)[:_LONGEST_TEXT]
    if isinstance(value, (list, tuple)):
        items = [plain(item, depth + 1) for item in cast("list[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "__array_interface__"):  # NumPy's
        with contextlib.suppress(TypeError, ValueError):  # of numbers that torch has too
            return torch.tensor(value)
    if (fields := _fields(value)) is not None:
        return {
            key if type(key) in (bool, int, float, str) else str(key): plain(inner, depth + 1)
            for key, inner in fields.items()
        }
    return repr(value)[:_LONGEST_TEXT]


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(cast("list[Any]", value)))
    elif (fields := _fields(value)) is not None:
        yield from ((f"[{key!r}]", inner) for key, inner in fields.items())


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """What *value* holds by name, if it is made of named parts."""
    if isinstance(value, Mapping):
        return cast("Mapping[Any, Any]", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    to_dict = getattr(value, "to_dict", None)  # graphs of PyTorch Geometric
    if callable(to_dict) and not isinstance(value, type):
        fields = to_dict()
        return cast("Mapping[Any, Any]", fields) if isinstance(fields, Mapping) else None
    return None
