"""Hyper-parameters as plain data, so that `torch.load(weights_only=True)` reads every checkpoint."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import PurePath
from typing import Any, cast

import torch
from pydantic import BaseModel

__all__ = ["foreign_values", "make_plain"]

_KEYS = ("hyper_parameters", "datamodule_hyper_parameters")
_LEAVES = (
    type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size,
    torch.dtype, torch.device,
)  # fmt: skip


def make_plain(checkpoint: MutableMapping[str, Any]) -> None:
    """Replace, in the hyper-parameters of *checkpoint*, what torch refuses to read back.

    Paths become text, enums their values, durations and dates ISO text, sets lists, pydantic models
    and dataclasses mappings. The hyper-parameters of the live model stay what they are.
    """
    for key in _KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint[key] = _plain(checkpoint[key])


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        return {_plain(k): _plain(v) for k, v in mapping.items()}
    if isinstance(value, (list, set, frozenset)):
        return [_plain(v) for v in cast("list[Any]", value)]
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in cast("tuple[Any, ...]", value))
    return _base_kind(value)


def _base_kind(value: Any) -> Any:
    """A subclass of a plain kind (a numpy number, a text class) as that kind."""
    kinds: list[Any] = [bool, int, float, str, bytes]
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


def foreign_values(value: Any, where: str = "checkpoint") -> Iterator[tuple[str, type]]:
    """Yield place and class of everything in *value* that `weights_only=True` would refuse."""
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        if type(mapping) not in (dict, OrderedDict):
            yield where, type(mapping)
            return
        for key, inner in mapping.items():
            if type(key) not in _LEAVES and not isinstance(key, tuple):
                yield f"{where}[{key!r}]", type(key)
            yield from foreign_values(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, inner in enumerate(cast("list[Any]", value)):
            yield from foreign_values(inner, f"{where}[{index}]")
    elif type(value) not in _LEAVES and not isinstance(value, torch.Tensor):
        yield where, type(value)
