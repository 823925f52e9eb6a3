"""Every hook that a plugin can implement: the contract, and all of it.

Implementations are module functions (or methods of an object) marked with `nshtrainer.hookimpl`,
found through the entry-point group `nshtrainer.plugins`. They run at config time on every rank,
in the order of distribution and entry name. One that raises is logged and left out; the others run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click
    from lightning.pytorch.callbacks import Callback

    from .callbacks.base import CallbackConfigBase
    from .trainer.config import TrainerConfig

__all__ = [
    "nshtrainer_cli",
    "nshtrainer_default_callbacks",
    "nshtrainer_modify_callbacks",
    "nshtrainer_run_metadata",
    "nshtrainer_validate_config",
]

hookspec = pluggy.HookspecMarker("nshtrainer")


@hookspec
def nshtrainer_default_callbacks(config: TrainerConfig) -> Iterable[CallbackConfigBase]:  # pyright: ignore[reportReturnType] -- a specification has no body
    """Return callbacks to add, unless *config* has one of that name already.

    Called when callbacks are resolved, and only if the config's `plugins.defaults` names the
    plugin's distribution: installing a package must not change a run. What is added is written into
    the config with `added_by`.
    """


@hookspec
def nshtrainer_modify_callbacks(
    config: TrainerConfig, callbacks: list[Callback]
) -> list[Callback] | None:
    """Have the last word on the resolved list; change it in place or return another one.

    *callbacks* is a copy, taken over only if the hook succeeds; what changed is logged.
    """


@hookspec
def nshtrainer_validate_config(config: TrainerConfig) -> None:
    """Raise ValueError if parts of *config* contradict each other; the run does not start then."""


@hookspec
def nshtrainer_run_metadata(config: TrainerConfig) -> dict[str, Any]:  # pyright: ignore[reportReturnType] -- as above
    """Return plain data to record with the run, under the plugin's distribution name."""


@hookspec
def nshtrainer_cli(app: click.Group) -> None:
    """Add commands to *app*; one that has the name of a core command is ignored with a warning."""
