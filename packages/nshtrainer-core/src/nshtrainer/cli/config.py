"""`nshtrainer config`: a config file to start from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.callbacks.conflicts import check_config
from nshtrainer.config_files import describe, load_data
from nshtrainer.errors import ConfigError
from nshtrainer.loggers.base import logger_registry
from nshtrainer.registry import Registry
from nshtrainer.trainer.config import SLOTS, TrainerConfig

from .commented import commented_yaml
from .output import OutputError, plugins_print_to_stderr, write_result

__all__ = ["config", "config_with"]


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file, not stdout."
)
@click.option(
    "--with",
    "names",
    multiple=True,
    metavar="NAME[:FIELD=VALUE,...]",
    help="Also include this callback, slot or logger, for example "
    "'ema:decay=0.999,every_n_steps=2'; values are YAML, so [a, b] is a list. May be given again.",
)
@click.option(
    "--schema", metavar="PATH", help="Name this JSON schema in the first line, for editors."
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def config(out: Path | None, names: tuple[str, ...], schema: str | None, force: bool) -> None:
    """Write a YAML config with all defaults and every field's documentation."""
    if out is not None and out.suffix.lower() not in {".yaml", ".yml"}:
        raise ConfigError(f"{out}: comments need YAML; expected a name that ends in .yaml or .yml")
    if out is not None and out.exists() and not force:
        raise OutputError(
            f"{out} is there already; choose another file, or replace it with --force"
        )
    with plugins_print_to_stderr():
        text = commented_yaml(config_with(names), schema=schema)
        made = TrainerConfig.from_text(text)  # what cannot be read back is not handed out
        _say_what_is_open(made)
    write_result(text, out)


def _say_what_is_open(made: TrainerConfig) -> None:
    """A file to start from may lack what a run needs, such as a metric; that is no error here."""
    try:
        check_config(made)
    except ConfigError as error:
        click.echo(f"note: no run can start with this yet: {error}", err=True)


def config_with(wanted: Sequence[str]) -> TrainerConfig:
    """The default configuration with callbacks, slots and loggers added.

    Args:
        wanted: Names, each alone or with values: `ema:decay=0.999,every_n_steps=2`.

    Raises:
        ConfigError: Nobody knows a name, a value does not fit, a field without a default has none, or
            the same is wanted twice.
        nshtrainer.PluginError: The plugin of a name is missing, or cannot be used.
    """
    made = TrainerConfig()
    seen: dict[str, str] = {}  # what was made -> what asked for it
    for text in wanted:
        name, _, assignments = text.partition(":")
        callback, values = SLOTS.get(name, name), _values(text, assignments)
        slot = next((s for s, held in SLOTS.items() if held == callback), None)
        if _is_logger(callback):
            added = _made(logger_registry, callback, values)
            others = [x for x in made.loggers if getattr(x, "name", None) != callback]
            made = made.replace(loggers=[*others, added])
        elif slot is not None:
            added = _made(callback_registry, callback, values)
            made = made.replace(**{slot: added})
        else:
            added = _made(callback_registry, callback, values)
            made = made.replace(callbacks=[*made.callbacks, added])
        _refuse_twice(seen, text, str(getattr(added, "identity", callback)))
    return made


def _refuse_twice(seen: dict[str, str], text: str, identity: str) -> None:
    """Note that *text* asks for *identity*.

    Raises:
        ConfigError: Something before asked for it; of two that are the same, no run takes both.
    """
    if identity in seen:
        raise ConfigError(
            f"--with {text}: --with {seen[identity]} gives {identity!r} already; write all its values "
            f"into one --with NAME:FIELD=VALUE,FIELD=VALUE"
        )
    seen[identity] = text


def _values(text: str, assignments: str) -> dict[str, Any]:
    """The values in `field=value,field=value`, each read as YAML."""
    values: dict[str, Any] = {}
    for part in _split(assignments):
        field, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--with {text}: {part!r} is no assignment; write NAME:FIELD=VALUE")
        if (field := field.strip()) in values:
            raise ConfigError(f"--with {text}: {field!r} has two values; remove one")
        values[field] = load_data(value, "yaml", source=f"--with {text}")
    return values


_PIECE = re.compile(
    r"""  (?<![^=,:\[{\s]) (?: "(?:\\.|[^"\\])*" | '(?:''|[^'])*' )   # a value in quotes, as in YAML
        | .                                                     # anything else, one by one
    """,
    re.VERBOSE | re.DOTALL,
)


def _split(assignments: str) -> list[str]:
    """*assignments* at those commas that stand in no list, mapping or quotes."""
    parts, depth = [""], 0
    for piece in _PIECE.findall(assignments):
        depth += (piece in "[{") - (piece in "]}")
        if piece == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts if assignments else []


def _is_logger(name: str) -> bool:
    return name in {*logger_registry.names(), *logger_registry.known} and (
        name not in callback_registry.names()
    )


def _made(registry: Registry[Any], name: str, values: Mapping[str, Any]) -> BaseModel:
    try:
        return registry[name].model_validate(values)
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
    except ValidationError as error:
        problems = error.errors()
        missing = [str(e["loc"][0]) for e in problems if e["type"] == "missing"]
        if len(missing) == len(problems):  # else a misspelt field may be the one that is missing
            example = ",".join(f"{field}=VALUE" for field in missing)
            raise ConfigError(
                f"{name!r} has no default for {', '.join(missing)}; write --with {name}:{example}"
            ) from None
        raise ConfigError(describe(error, f"--with {name}")) from None
