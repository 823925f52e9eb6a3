"""Finds, before anything is built, what a run with callbacks of this family would be stopped by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nshtrainer.plugins.hooks import hookimpl

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["nshtrainer_validate_config"]


@hookimpl
def nshtrainer_validate_config(config: TrainerConfig) -> None:
    """Refuse two averages of one module, and early stopping that has no metric to wait for.

    Raises:
        ConfigError: There is one of them.
    """
    from .early_stopping.config import EarlyStoppingCallbackConfig
    from .ema.config import EMACallbackConfig

    EMACallbackConfig.check_alone(config.callbacks)
    for callback in [*config.callbacks, config.early_stopping]:
        if isinstance(callback, EarlyStoppingCallbackConfig):
            callback.metric_of(config)
