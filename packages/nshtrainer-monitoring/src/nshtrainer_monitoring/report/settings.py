"""A configuration as lines of name and value, so that it can be shown and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

__all__ = ["callbacks_of", "differences", "flat", "value_text"]

_SHARED = ("name", "enabled", "priority")
_OF_A_RUN = ("id",)
"""What differs between any two runs."""


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return *config* with a dotted name for each value; a callback in a list is told by its name.

    `{"callbacks": [{"name": "ema", "decay": 0.9}]}` gives `callbacks[ema].decay`.
    """
    result: dict[str, Any] = {}
    _flatten("", config, result, 0)
    return result


def _flatten(name: str, value: Any, result: dict[str, Any], depth: int) -> None:
    if depth < 40 and isinstance(value, Mapping) and value:
        for key, item in cast("Mapping[Any, Any]", value).items():
            _flatten(f"{name}.{key}" if name else str(key), item, result, depth + 1)
    elif isinstance(value, list) and (keys := _names(cast("list[Any]", value))):
        for key, item in zip(keys, cast("list[Any]", value), strict=True):
            _flatten(f"{name}[{key}]", item, result, depth + 1)
    else:
        result[name] = value


def _names(items: Sequence[Any]) -> list[str]:
    """The names of mappings in a list, made different from each other; empty if they are none."""
    if not items or not all(isinstance(item, Mapping) for item in items):
        return []
    names: list[str] = []
    for item in cast("Sequence[Mapping[str, Any]]", items):
        own = str(item.get("label") or item.get("name", ""))
        name, number = own, 2
        while name in names or not name:
            name, number = f"{own} {number}".strip(), number + 1
        names.append(name)
    return names


def callbacks_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The callbacks: the slot or "", the name, and the options that are set."""
    for slot, value in config.items():
        if isinstance(value, Mapping) and "enabled" in value and "name" in value:
            yield slot, str(value["name"]), _options(cast("Mapping[str, Any]", value))
    listed = config.get("callbacks")
    for item in cast("list[Any]", listed) if isinstance(listed, list) else []:
        if isinstance(item, Mapping):
            found = cast("Mapping[str, Any]", item)
            yield "", str(found.get("name", "")), _options(found)
        else:
            yield "", str(item), {}


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    off = {} if config.get("enabled", True) else {"enabled": False}
    return {**off, **{k: v for k, v in config.items() if k not in _SHARED and v is not None}}


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what is not the same in all of *configs*: name -> the values, as text."""
    flattened = [flat(config) for config in configs]
    names = list(dict.fromkeys(name for config in flattened for name in config))
    found: dict[str, list[str]] = {}
    for name in names:
        values = [value_text(c[name]) if name in c else "" for c in flattened]
        if len(set(values)) > 1 and name not in _OF_A_RUN:
            found[name] = values
    return found


def value_text(value: Any, longest: int = 300) -> str:
    """*value* in one line, as a configuration file has it."""
    if isinstance(value, str):
        text = value or '""'
    else:
        try:
            text = json.dumps(value, default=str, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
