"""Finding mutable objects that two callbacks share."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from lightning.pytorch.callbacks import Callback
from pydantic import BaseModel
from torch import Tensor, nn

__all__ = ["mutable_parts", "top_package"]

_MUTABLE = (dict, list, set, bytearray, Tensor, nn.Module, BaseModel, Callback)
_NOT_ENTERED = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, logging.Logger)


def mutable_parts(root: object, packages: Collection[str]) -> dict[int, tuple[str, object]]:
    """Return the mutable objects that can be reached from *root*: id -> path and object.

    Args:
        root: Where to begin.
        packages: Top-level packages whose objects are looked into; a library's may be singletons
            (a file system, a client).
    """
    found: dict[int, tuple[str, object]] = {}
    seen: set[int] = set()
    todo: list[tuple[str, object]] = [("", root)]
    thing: Any
    while todo:
        path, thing = todo.pop()
        key = id(cast("object", thing))
        if key in seen or isinstance(thing, _NOT_ENTERED):
            continue
        seen.add(key)
        if isinstance(thing, _MUTABLE):
            found[key] = (path, cast("object", thing))
        if (
            isinstance(thing, (*_MUTABLE, tuple, frozenset))
            or top_package(cast("object", thing)) in packages
        ):
            todo.extend((path + step, part) for step, part in _parts(thing))
    return found


def top_package(thing: object) -> str:
    """The first part of the name of the module that the class of *thing* is defined in."""
    return type(thing).__module__.partition(".")[0]


def _parts(thing: Any) -> Iterator[tuple[str, object]]:
    if isinstance(thing, Mapping):
        pairs = cast("Mapping[Any, Any]", thing).items()
        yield from ((f"[{key!r}]", value) for key, value in pairs)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        values = cast("list[Any]", thing)
        yield from ((f"[{index}]", value) for index, value in enumerate(values))
    attributes: dict[str, Any] = getattr(cast("object", thing), "__dict__", {})
    yield from ((f".{name}", value) for name, value in attributes.items())
