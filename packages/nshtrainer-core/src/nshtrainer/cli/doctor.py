"""`doctor`, for who calls this group; the program itself runs it without importing nshtrainer."""

from __future__ import annotations

import click

from nshtrainer_cli.doctor import main as run

__all__ = ["doctor"]


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def doctor(ctx: click.Context, args: tuple[str, ...]) -> None:
    """Examine this environment."""
    ctx.exit(run(args))
