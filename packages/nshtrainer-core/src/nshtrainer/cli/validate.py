"""`nshtrainer validate`: is a config file right? Torch is not needed to tell."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from nshtrainer.callbacks.conflicts import check_config
from nshtrainer.config_files import format_of as config_format
from nshtrainer.config_files import parse, read_text
from nshtrainer.errors import ConfigError, NshTrainerError
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

    Fields, names, values and conflicts that plugins know of are checked. Nothing is written.
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
        try:
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
        "notes": list(_notes(config)),
    }


def _notes(config: TrainerConfig) -> Iterator[str]:
    """What is allowed but may not be meant."""
    times = Counter(c.identity for c in config.callbacks if not c.metadata.ignore_if_exists)
    for identity, count in times.items():
        if count > 1:
            yield (
                f"{identity!r} stands {count} times in `callbacks`; a run may refuse that: "
                "remove one, or tell them apart with different `label`s"
            )
