"""`nshtrainer config`: a config file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.config_files import dotted
from nshtrainer.errors import ConfigError
from nshtrainer.loggers.base import logger_registry
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
    metavar="NAME",
    help="Also include this callback, slot or logger with its defaults; may be given again.",
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
        TrainerConfig.from_text(text)  # what cannot be read back is not handed out
    write_result(text, out)


def config_with(names: tuple[str, ...]) -> TrainerConfig:
    """The default configuration with the callbacks, slots and loggers *names* added.

    Raises:
        ConfigError: Nobody knows a name, or something has fields without a default.
        nshtrainer.PluginError: The plugin of a name is missing, or cannot be used.
    """
    made = TrainerConfig()
    for name in dict.fromkeys(names):
        callback = SLOTS.get(name, name)
        slot = next((s for s, held in SLOTS.items() if held == callback), None)
        if slot is not None:
            if getattr(made, slot) is None:
                made = made.replace(**{slot: _default(callback_registry, callback)})
        elif _is_logger(callback):
            if callback not in {getattr(logger, "name", None) for logger in made.loggers}:
                made = made.replace(loggers=[*made.loggers, _default(logger_registry, callback)])
        else:
            made = made.replace(callbacks=[*made.callbacks, _default(callback_registry, callback)])
    return made


def _is_logger(name: str) -> bool:
    return name in {*logger_registry.names(), *logger_registry.known} and (
        name not in callback_registry.names()
    )


def _default(registry: Any, name: str) -> BaseModel:
    try:
        return registry[name]()
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
    except ValidationError as error:
        fields = ", ".join(dict.fromkeys(dotted(e["loc"]) for e in error.errors()))
        raise ConfigError(
            f"{name!r} has no usable default for {fields}; leave it out here and write it into the "
            f"file by hand"
        ) from error
