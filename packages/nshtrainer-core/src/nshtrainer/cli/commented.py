"""A configuration as YAML with every field's documentation beside it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel
from typing_extensions import TypeIs

from nshtrainer.config_files import as_data, dump_yaml
from nshtrainer.field_docs import field_docs
from nshtrainer.trainer.config import TrainerConfig
from nshtrainer.trainer.lightning_arguments import LightningArguments

__all__ = ["commented_yaml"]

_WIDTH = 96
_HEAD = (
    "A training run for nshtrainer. Every field is here with its default, so whatever is not "
    "changed can be deleted. Where a comment says None, YAML says null."
)
_LIGHTNING = "Arguments of Lightning's Trainer; null leaves the choice to Lightning."


def commented_yaml(config: TrainerConfig, *, schema: str | None = None) -> str:
    """*config* as YAML text that reads back as an equal configuration.

    Args:
        config: What to write.
        schema: Path or address of a JSON schema, for editors; None writes no such line.
    """
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines += _comment(_HEAD, 0)
    data = as_data(config)
    fields = _fields(config)
    own = [name for name in fields if name not in LightningArguments.model_fields]
    lightning = [name for name in fields if name in LightningArguments.model_fields]
    for name in own:
        lines += ["", *_field(config, name, data)]
    lines += ["", "", *_comment(_LIGHTNING, 0)]
    for name in lightning:
        lines += ["", *_field(config, name, data)]
    return "\n".join(lines) + "\n"


def _fields(config: BaseModel) -> list[str]:
    """The fields of *config*: the tag, then what its class adds, then what it inherits."""
    names = list(type(config).model_fields)
    depth = {
        name: next(
            (
                i
                for i, cls in enumerate(type(config).__mro__)
                if name in inspect.get_annotations(cls)
            ),
            len(names),
        )
        for name in names
    }
    is_tagged = not isinstance(config, TrainerConfig)
    return sorted(names, key=lambda name: (not (is_tagged and name == "name"), depth[name]))


def _field(config: BaseModel, name: str, data: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one field, flush left."""
    if name not in data:  # excluded from serialization
        return
    yield from _comment(field_docs(type(config)).get(name, ""), 0)
    live, value = getattr(config, name), data[name]
    if isinstance(live, BaseModel) and value:
        yield f"{name}:"
        yield from _indented(_mapping(live, value), "  ")
    elif _are_configs(live):
        yield f"{name}:"
        for item, item_data in zip(live, value, strict=True):
            yield from _item(item, item_data)
    else:
        yield from dump_yaml({name: value}).splitlines()


def _are_configs(live: object) -> TypeIs[Sequence[BaseModel]]:
    items = cast("Sequence[object]", live) if isinstance(live, (list, tuple)) else ()
    return bool(items) and all(isinstance(item, BaseModel) for item in items)


def _mapping(config: BaseModel, data: Mapping[str, Any]) -> Iterator[str]:
    for name in _fields(config):
        yield from _field(config, name, data)


def _item(config: BaseModel, data: Mapping[str, Any]) -> Iterator[str]:
    """One configuration in a list; the comment of its first field stands above the dash."""
    yield from _comment(inspect.getdoc(type(config)) or "", 2, paragraphs=1)
    lines = list(_mapping(config, data))
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    yield from _indented(lines[:first], "  ")
    yield f"  - {lines[first]}"
    yield from _indented(lines[first + 1 :], "    ")


def _indented(lines: Sequence[str] | Iterator[str], prefix: str) -> Iterator[str]:
    return (f"{prefix}{line}" if line else "" for line in lines)


def _comment(text: str, indent: int, *, paragraphs: int = 0) -> list[str]:
    """*text* as comment lines; *paragraphs* above 0 keeps only so many of them."""
    blocks = [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]
    lines: list[str] = []
    for block in blocks[:paragraphs] if paragraphs else blocks:
        lines += [f"{' ' * indent}# {line}" for line in textwrap.wrap(block, _WIDTH - indent)]
    return lines
