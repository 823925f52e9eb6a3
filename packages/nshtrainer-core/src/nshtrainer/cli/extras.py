"""Commands that plugins add with the hook `nshtrainer_cli`.

They are asked for when the help is shown or a command is typed that the core does not have. Each
plugin gets a group of its own, so one that fails half-way leaves nothing behind.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import click

from nshtrainer.plugins.hooks import plugin_manager

__all__ = ["extra_commands", "forget_extra_commands"]

log = logging.getLogger(__name__)


def extra_commands(taken: Iterable[str]) -> dict[str, click.Command]:
    """The plugins' commands by name; asked for once per process.

    Args:
        taken: Names that no plugin can have.

    Raises:
        nshtrainer.PluginLoadError: A plugin failed and `NSHTRAINER_PLUGINS_STRICT` is set.
    """
    return _gather(tuple(sorted(taken)))


@functools.lru_cache(maxsize=1)
def _gather(taken: tuple[str, ...]) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    owner = dict.fromkeys(taken, "nshtrainer-core")
    for call in plugin_manager.each("nshtrainer_cli"):
        group = click.Group("nshtrainer")
        try:
            call(app=group)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- one plugin's fault is its own
            plugin_manager.failed(
                call, error if isinstance(error, Exception) else RuntimeError(repr(error))
            )
            continue
        for name, command in group.commands.items():
            if name in owner:
                log.warning(
                    "the command %r of %s is left out: %s has one of that name",
                    name, call.dist, owner[name],
                )  # fmt: skip
                continue
            owner[name], found[name] = call.dist, command
    return found


def forget_extra_commands() -> None:
    """Ask the plugins again at the next look-up."""
    _gather.cache_clear()
