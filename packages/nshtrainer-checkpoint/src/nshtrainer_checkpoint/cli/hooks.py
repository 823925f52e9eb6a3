"""Adds `nshtrainer checkpoint` to the command line; the entry point of this distribution's hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nshtrainer.plugins.hooks import hookimpl

if TYPE_CHECKING:
    import click

__all__ = ["nshtrainer_cli"]


@hookimpl
def nshtrainer_cli(app: click.Group) -> None:
    """Add the group `checkpoint`."""
    from .commands import checkpoint

    app.add_command(checkpoint)
