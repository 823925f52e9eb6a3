"""Adds `nshtrainer report` to the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nshtrainer.plugins.hooks import hookimpl

if TYPE_CHECKING:
    import click

__all__ = ["nshtrainer_cli"]


@hookimpl
def nshtrainer_cli(app: click.Group) -> None:
    """Add the command `report`."""
    from .command import report

    app.add_command(report)
