"""Conflicts between the parts of a configuration, as plugins see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nshtrainer.errors import ConfigError
from nshtrainer.plugins.hooks import plugin_manager

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["check_config"]


def check_config(config: TrainerConfig) -> None:
    """Let plugins look for conflicts in *config*.

    Raises:
        ConfigError: One was found; the message is the plugin's.
    """
    problems: list[str] = []
    for call in plugin_manager.each("nshtrainer_validate_config"):
        try:
            call(config=config)
        except ValueError as error:
            problems.append(f"{call.dist}: {error}")
        except Exception as error:  # noqa: BLE001 -- one plugin's fault is not the config's
            plugin_manager.failed(call, error)
    if problems:
        raise ConfigError("the configuration contradicts itself: " + "; ".join(problems))
