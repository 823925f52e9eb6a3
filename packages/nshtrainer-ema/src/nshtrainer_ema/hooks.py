"""Finds, before anything is built, what a run with callbacks of this family would be stopped by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nshtrainer.errors import ConfigError
from nshtrainer.plugins.hooks import hookimpl

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["nshtrainer_validate_config"]


@hookimpl
def nshtrainer_validate_config(config: TrainerConfig) -> None:
    """Refuse two averages of one module, and early stopping that lacks what it needs.

    That is a metric to wait for, and checkpoints where it is to restore the best weights.

    Raises:
        ConfigError: There is one of them.
    """
    from .early_stopping.config import EarlyStoppingCallbackConfig
    from .ema.config import EMACallbackConfig

    EMACallbackConfig.check_alone(config.callbacks)
    for callback in [*config.callbacks, config.early_stopping]:
        if isinstance(callback, EarlyStoppingCallbackConfig):
            metric = callback.metric_of(config)
            if callback.restore_best_weights and config.enable_checkpointing is False:
                raise ConfigError(
                    f"early_stopping is to restore the weights with the best {metric.name!r}, and "
                    "enable_checkpointing=False forbids to save any; set one of the two "
                    "(restore_best_weights, enable_checkpointing) the other way round"
                )
