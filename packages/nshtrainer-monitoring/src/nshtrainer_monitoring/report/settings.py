"""A configuration as lines of name and value, so that it can be shown and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.errors import NshTrainerError

__all__ = ["callbacks_of", "changed", "differences", "flat", "is_slot", "value_text"]

_SHARED = ("name", "metadata", "added_by")
_WHOLE = 1 << 62
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
    if depth < 40 and isinstance(value, Mapping) and (value or not name):
        for key, item in cast("Mapping[Any, Any]", value).items():
            _flatten(f"{name}.{key}" if name else str(key), item, result, depth + 1)
    elif keys := _names(value):
        for key, item in zip(keys, cast("list[Any]", value), strict=True):
            _flatten(f"{name}[{key}]", item, result, depth + 1)
    else:
        result[name] = value


def _names(value: Any) -> list[str]:
    """The names of mappings in a list, made different from each other; empty if it is no such list."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    if not all(isinstance(item, Mapping) for item in items):
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
    """The callbacks: the slot or "", the name, and the options that are not the defaults.

    What is in the list of another one, such as the checkpoints of `checkpoint_saving`, follows it.
    """
    for slot, value in config.items():
        if is_slot(value):
            yield from _callback(slot, cast("Mapping[str, Any]", value))
    listed = config.get("callbacks")
    for item in cast("list[Any]", listed) if isinstance(listed, list) else []:
        if isinstance(item, Mapping):
            yield from _callback("", cast("Mapping[str, Any]", item))
        else:
            yield "", str(item), {}


def is_slot(value: Any) -> bool:
    """Whether *value* is the configuration of a callback."""
    return (
        isinstance(value, Mapping)
        and "name" in value
        and ("metadata" in value or "enabled" in value)
    )


def _callback(slot: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    name = str(config.get("name", ""))
    options = {k: v for k, v in changed(config, _class_of(name)).items() if k not in _SHARED}
    inner = [k for k, v in options.items() if all(map(is_slot, _items(v))) and _items(v)]
    yield slot, name, {k: v for k, v in options.items() if k not in inner}
    for key in inner:
        for item in _items(options[key]):
            yield from _callback(slot, item)


def _items(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def changed(config: Mapping[str, Any], cls: type[BaseModel] | None) -> dict[str, Any]:
    """What of *config* is not the default of its class, or not None where that is not known."""
    defaults = {} if cls is None else _defaults(cls)
    return {
        name: value
        for name, value in config.items()
        if value is not None
        and (name not in defaults or value_text(value) != value_text(defaults[name]))
    }


def _defaults(cls: type[BaseModel]) -> dict[str, Any]:
    try:
        return {
            name: field.get_default(call_default_factory=True, validated_data={})
            for name, field in cls.model_fields.items()
        }
    except Exception:  # noqa: BLE001 -- a plugin's factory may do anything; then all options are shown
        return {}


def _class_of(name: str) -> type[BaseModel] | None:
    try:
        found = callback_registry.resolve(name)
    except NshTrainerError:  # a broken plugin, where these are errors
        return None
    return found if isinstance(found, type) else None


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what is not the same in all of *configs*: name -> the values as text, "" for none."""
    flattened = [{k: v for k, v in flat(config).items() if v is not None} for config in configs]
    names = list(dict.fromkeys(name for config in flattened for name in config))
    found: dict[str, list[str]] = {}
    for name in names:
        whole = {value_text(c[name], _WHOLE) if name in c else "" for c in flattened}
        if len(whole) > 1 and name not in _OF_A_RUN and ".metadata." not in name:
            found[name] = [value_text(c[name]) if name in c else "" for c in flattened]
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
