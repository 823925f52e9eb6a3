"""The command group: core's commands by name, plugins' commands by hook."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click
from pydantic import ValidationError
from typing_extensions import override

from nshtrainer.errors import NshTrainerError
from nshtrainer.spelling import nearest

from .extras import extra_commands

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "config": ("nshtrainer.cli.config:config", "Write a commented config file with all defaults."),
    "demo": (
        "nshtrainer.demo.command:demo",
        "Train a small model here: a real run in under a minute.",
    ),
    "doctor": (
        "nshtrainer.cli.doctor:doctor",
        "Examine this environment; runs when nothing else does.",
    ),
    "plugins": (
        "nshtrainer.cli.plugins:plugins",
        "List what is installed, and in which state it is.",
    ),
    "schema": (
        "nshtrainer.cli.schema:schema",
        "Print the JSON schema of config files, for editors.",
    ),
    "validate": ("nshtrainer.cli.validate:validate", "Check a config file."),
}
"""Command -> where it is, and its line in the list of commands."""


class _App(click.Group):
    """A group whose commands are imported one at a time."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*sorted(COMMANDS), *sorted(extra_commands(COMMANDS))]

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return extra_commands(COMMANDS).get(cmd_name)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in sorted(COMMANDS.items())])
        extras = _extras_or_none()
        if extras:
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, _short_help(extras[name])) for name in sorted(extras)])

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if (
            not ctx.resilient_parsing
            and not name.startswith("-")
            and self.get_command(ctx, name) is None
        ):
            known = self.list_commands(ctx)
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
            raise click.UsageError(f"no command is named {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NshTrainerError as error:
            raise click.ClickException(str(error)) from error
        except ValidationError as error:
            from nshtrainer.config_files import describe

            raise click.ClickException(describe(error, error.title)) from error


def _extras_or_none() -> dict[str, click.Command]:
    """The plugins' commands; whatever is the matter with a plugin, help is printed."""
    try:
        return extra_commands(COMMANDS)
    except NshTrainerError as error:  # strict mode
        click.echo(f"warning: the commands of plugins are not listed: {error}", err=True)
        return {}


def _short_help(command: click.Command) -> str:
    try:
        return command.get_short_help_str(limit=70)
    except Exception:  # noqa: BLE001 -- a plugin's command class may do anything
        return ""


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import nshtrainer

        click.echo(f"nshtrainer {nshtrainer.__version__}")
        ctx.exit()


app = _App(
    name="nshtrainer",
    help="Training runs for PyTorch Lightning, described by one config; every callback is a plugin.",
    epilog="`nshtrainer demo` shows a run, `nshtrainer config --out run.yaml` writes a file to start from, "
    "and `nshtrainer COMMAND --help` tells more of a command.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and exit.",
        )
    ],
)
"""The command line as a click group."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ends with `SystemExit`.

    Args:
        args: What follows the program's name; None takes it from `sys.argv`.
    """
    app.main(args=None if args is None else list(args), prog_name="nshtrainer")
