"""`nshtrainer validate`: is a config file right? Torch is not needed to tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.callbacks.conflicts import check_config
from nshtrainer.config_files import format_of as config_format
from nshtrainer.config_files import parse, read_text
from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.plugins.catalogue import CORE, FAMILIES
from nshtrainer.plugins.policy import using_policy
from nshtrainer.trainer.config import SLOTS, TrainerConfig

from .output import plugins_print_to_stderr

__all__ = ["validate"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option(
    "--build",
    is_flag=True,
    help="Also build the callbacks, as training would; imports torch and Lightning.",
)
@click.pass_context
def validate(ctx: click.Context, file: Path, as_json: bool, build: bool) -> None:
    """Check the config FILE (YAML, JSON or TOML); exit status 1 if it cannot be used.

    Fields, names, values, callbacks that stand twice, and conflicts that plugins know of are checked.
    Nothing is written.
    """
    report: dict[str, Any] = {"file": str(file), "ok": True}
    try:
        with plugins_print_to_stderr():
            report |= _examine(file, build=build)
    except NshTrainerError as error:
        report |= {"ok": False, "error": str(error)}
    except Exception as error:  # noqa: BLE001 -- a plugin's own validator may raise anything
        report |= {"ok": False, "error": f"{file}: a plugin raised {type(error).__name__}: {error}"}
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif report["ok"]:
        for note in report["notes"]:
            click.echo(f"note: {note}", err=True)
        click.echo(_summary(report))
    else:
        click.echo(f"Error: {report['error']}", err=True)
    ctx.exit(0 if report["ok"] else 1)


def _summary(report: dict[str, Any]) -> str:
    callbacks, loggers = report["callbacks"], report["loggers"]
    parts = (
        f"{len(names)} {what}{'' if len(names) == 1 else 's'}"
        + (f" ({', '.join(names)})" if names else "")
        for what, names in (("callback", callbacks), ("logger", loggers))
    )
    return f"ok: {', '.join(parts)}"


def _examine(file: Path, *, build: bool) -> dict[str, Any]:
    config = parse(TrainerConfig, read_text(file), config_format(file), source=str(file))
    with using_policy(config.plugins):
        doubled = _doubled(config)
        try:
            _refuse_own(doubled)
            check_config(config)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
    if build:
        from nshtrainer.callbacks.assembly import resolve_callbacks

        resolve_callbacks(config)
    slots = (getattr(config, slot) for slot in SLOTS)
    held = [*(c for c in slots if c is not None), *config.callbacks]
    return {
        "callbacks": [c.identity for c in held],
        "loggers": [str(getattr(x, "name", "")) for x in config.loggers if x.enabled],
        "notes": [
            f"{_twice(several)}; a run may refuse that: {_ONE_ONLY}" for several in doubled.values()
        ],
    }


_ONE_ONLY = "remove one, or tell them apart with different `label`s"


def _doubled(config: TrainerConfig) -> dict[str, list[CallbackConfigBase]]:
    """Identity -> the entries of `callbacks` that share it, where several do."""
    found: dict[str, list[CallbackConfigBase]] = {}
    for held in config.callbacks:
        if not held.metadata.ignore_if_exists:
            found.setdefault(held.identity, []).append(held)
    return {identity: several for identity, several in found.items() if len(several) > 1}


def _twice(several: list[CallbackConfigBase]) -> str:
    return f"{several[0].identity!r} stands {len(several)} times in `callbacks`"


def _refuse_own(doubled: Mapping[str, list[CallbackConfigBase]]) -> None:
    """A run keeps the state of each of our callbacks under its identity, and so takes one of each.

    Of somebody else's that is not known before they are made.

    Raises:
        ConfigError: One of ours stands twice.
    """
    for several in doubled.values():
        if all(_is_ours(held) for held in several):
            raise ConfigError(f"{_twice(several)}; {_ONE_ONLY}")


def _is_ours(held: CallbackConfigBase) -> bool:
    entry = callback_registry.entry_of(type(held))
    return entry is not None and entry.dist in {CORE, *FAMILIES}
