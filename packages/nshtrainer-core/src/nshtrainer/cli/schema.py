"""`nshtrainer schema`: the JSON schema of config files, with everything that is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.loggers.base import logger_registry
from nshtrainer.plugins.manifest import CALLBACKS, LOGGERS, manifest
from nshtrainer.plugins.policy import PluginsConfig, using_policy
from nshtrainer.trainer.config import SLOTS, TrainerConfig

from .output import plugins_print_to_stderr, write_result

__all__ = ["config_schema", "schema"]

_REGISTRIES = {CALLBACKS: callback_registry, LOGGERS: logger_registry}


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file, not stdout."
)
def schema(out: Path | None) -> None:
    """Print the JSON schema of config files, for editors.

    It covers the plugins that are installed; one that cannot be used is left out and named on stderr.
    """
    with plugins_print_to_stderr():
        document, left_out = config_schema()
    for problem in left_out:
        click.echo(f"warning: left out of the schema: {problem}", err=True)
    write_result(json.dumps(document, indent=2) + "\n", out)


def config_schema() -> tuple[dict[str, Any], list[str]]:
    """The schema of `TrainerConfig` files, and what had to be left out of it, in words."""
    unfit = dict(_without_schema())
    with using_policy(PluginsConfig(disable=sorted(unfit)) if unfit else None):
        body = TrainerConfig.model_json_schema()
    _allow_what_files_may_say(body["properties"])
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:nshtrainer:trainer-config",
        **body,
        "title": "nshtrainer training run",
    }
    return document, [*_unusable(), *unfit.values()]


def _without_schema() -> Iterator[tuple[str, str]]:
    """Names of classes that work but that JSON schema cannot describe, each with the reason."""
    for registry in _REGISTRIES.values():
        for name, cls in registry.load_all().items():
            try:
                cls.model_json_schema()
            except Exception as error:  # noqa: BLE001 -- a plugin's own schema code may raise anything
                entry = registry.entry_of(cls)
                reason = str(error).partition("\n")[0]
                yield name, f"{name!r} of {entry or cls.__module__}: {reason}"


def _unusable() -> Iterator[str]:
    for entry in manifest():
        registry = _REGISTRIES.get(entry.group)
        state = registry.state(entry) if registry is not None else None
        if state is not None and not state.is_usable:
            yield str(state)


def _allow_what_files_may_say(properties: dict[str, Any]) -> None:
    """Spellings that a file may use and that are turned into the field's type before validation."""
    properties["$schema"] = {"type": "string", "description": "For editors; ignored."}
    for slot in SLOTS:
        _also(properties[slot], {"const": False})
    for name in ("name", "tags", "notes"):
        _also(properties[name], {"type": "string"})
    _also(properties["loggers"], {"type": "null"})


def _also(field: dict[str, Any], choice: dict[str, Any]) -> None:
    """Let *field* be *choice* too."""
    if "anyOf" in field:
        cast("list[Any]", field["anyOf"]).append(choice)
        return
    notes = {k: field.pop(k) for k in ("title", "description", "default") if k in field}
    was = dict(field)
    field.clear()
    field |= {**notes, "anyOf": [was, choice]}
