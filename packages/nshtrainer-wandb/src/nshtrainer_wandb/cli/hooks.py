"""Adds `nshtrainer wandb` to the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nshtrainer.plugins.hooks import hookimpl

if TYPE_CHECKING:
    import click

__all__ = ["nshtrainer_cli"]


@hookimpl
def nshtrainer_cli(app: click.Group) -> None:
    """Add the group `wandb`."""
    from .commands import wandb

    app.add_command(wandb)
