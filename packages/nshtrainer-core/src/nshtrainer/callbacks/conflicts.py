"""Conflicts between the parts of a configuration, as plugins see them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from nshtrainer.errors import ConfigError
from nshtrainer.plugins.hooks import plugin_manager

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["check_config"]


def check_config(config: TrainerConfig) -> None:
    """Let plugins look for conflicts in *config*, each in a copy of its own (of the same run).

    Raises:
        ConfigError: One was found; the message is the plugin's.
    """
    problems: list[str] = []
    for call in plugin_manager.each("nshtrainer_validate_config"):
        own = copy.deepcopy(config, {id(config.run): config.run})
        with plugin_manager.guarding(call):
            try:
                call(config=own)
            except ValueError as error:
                problems.append(f"{call.dist}: {error}")
    if problems:
        raise ConfigError("the configuration contradicts itself: " + "; ".join(problems))
