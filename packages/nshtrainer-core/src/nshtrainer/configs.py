"""Every installed configuration class by its name: `from nshtrainer.configs import X`."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from .callbacks.base import CallbackConfigBase, CallbackMetadataConfig, callback_registry
from .directory import DirectoryConfig
from .errors import DuplicateNameError, PluginNotInstalledError
from .loggers.base import LoggerConfigBase, logger_registry
from .metric import MetricConfig
from .plugins.catalogue import CLASSES, install_command
from .plugins.manifest import CALLBACKS, LOGGERS, Entry, manifest
from .plugins.policy import PluginsConfig
from .plugins.state import PluginState
from .trainer.config import TrainerConfig

if TYPE_CHECKING:
    from nshtrainer_checkpoint.config import (
        BestCheckpointCallbackConfig,
        CheckpointSavingConfig,
        LastCheckpointCallbackConfig,
        OnExceptionCheckpointCallbackConfig,
    )
    from nshtrainer_ema.early_stopping.config import EarlyStoppingCallbackConfig
    from nshtrainer_ema.ema.config import EMACallbackConfig
    from nshtrainer_ema.gradient_skipping.config import GradientSkippingCallbackConfig
    from nshtrainer_ema.shared_parameters.config import SharedParametersCallbackConfig
    from nshtrainer_monitoring.debug_flag.config import DebugFlagCallbackConfig
    from nshtrainer_monitoring.epoch_timer.config import EpochTimerCallbackConfig
    from nshtrainer_monitoring.finite_checks.config import FiniteChecksCallbackConfig
    from nshtrainer_monitoring.log_epoch.config import LogEpochCallbackConfig
    from nshtrainer_monitoring.lr_monitor.config import LearningRateMonitorConfig
    from nshtrainer_monitoring.metric_validation.config import MetricValidationCallbackConfig
    from nshtrainer_monitoring.norm_logging.config import NormLoggingCallbackConfig
    from nshtrainer_monitoring.print_table.config import PrintTableMetricsCallbackConfig
    from nshtrainer_wandb.act_save.config import ActSaveConfig
    from nshtrainer_wandb.checkpoints.config import WandbCheckpointsCallbackConfig
    from nshtrainer_wandb.logger.config import WandbLoggerConfig
    from nshtrainer_wandb.upload_code.config import WandbUploadCodeCallbackConfig
    from nshtrainer_wandb.watch.config import WandbWatchCallbackConfig

    from .loggers.csv import CSVLoggerConfig
    from .loggers.tensorboard import TensorboardLoggerConfig

    __all__ = [
        "ActSaveConfig",
        "BestCheckpointCallbackConfig",
        "CSVLoggerConfig",
        "CallbackConfigBase",
        "CallbackMetadataConfig",
        "CheckpointSavingConfig",
        "DebugFlagCallbackConfig",
        "DirectoryConfig",
        "EMACallbackConfig",
        "EarlyStoppingCallbackConfig",
        "EpochTimerCallbackConfig",
        "FiniteChecksCallbackConfig",
        "GradientSkippingCallbackConfig",
        "LastCheckpointCallbackConfig",
        "LearningRateMonitorConfig",
        "LogEpochCallbackConfig",
        "LoggerConfigBase",
        "MetricConfig",
        "MetricValidationCallbackConfig",
        "NormLoggingCallbackConfig",
        "OnExceptionCheckpointCallbackConfig",
        "PluginsConfig",
        "PrintTableMetricsCallbackConfig",
        "SharedParametersCallbackConfig",
        "TensorboardLoggerConfig",
        "TrainerConfig",
        "WandbCheckpointsCallbackConfig",
        "WandbLoggerConfig",
        "WandbUploadCodeCallbackConfig",
        "WandbWatchCallbackConfig",
    ]

log = logging.getLogger(__name__)

_OWN = {
    cls.__name__: cls
    for cls in (
        CallbackConfigBase, CallbackMetadataConfig, DirectoryConfig, LoggerConfigBase,
        MetricConfig, PluginsConfig, TrainerConfig,
    )
}  # fmt: skip
_REGISTRIES = {CALLBACKS: callback_registry, LOGGERS: logger_registry}


def _providers() -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in manifest():
        if entry.group in _REGISTRIES:
            found.setdefault(entry.class_name, []).append(entry)
    return found


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    entries = _providers().get(name, [])
    if len({e.dist for e in entries}) > 1:
        both = " and ".join(str(e) for e in entries)
        raise DuplicateNameError(
            f"the class name {name!r} is provided by {both}; import it from its own module"
        )
    if entries:
        return _REGISTRIES[entries[0].group][entries[0].name]
    if name in CLASSES:
        dist = CLASSES[name]
        raise PluginNotInstalledError(
            f"{name} is provided by {dist}, which is not installed; run `{install_command(dist)}`"
        )
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_names())}"
    )


def _names() -> list[str]:
    """Every name that one distribution provides, whether it can be loaded or not."""
    unique = (n for n, entries in _providers().items() if len({e.dist for e in entries}) == 1)
    return sorted({*_OWN, *unique})


def __dir__() -> list[str]:
    """The names that can be had: a broken plugin must not break a star import of the others."""
    providers = _providers()
    return [name for name in _names() if name in _OWN or _loads(providers[name][0])]


def _loads(entry: Entry) -> bool:
    found = _REGISTRIES[entry.group].resolve(entry.name)
    if isinstance(found, PluginState) and found.kind != "disabled":
        _warn_once(f"{entry.class_name} is left out of nshtrainer.configs: {found}")
    return isinstance(found, type)


@functools.lru_cache(maxsize=64)
def _warn_once(problem: str) -> None:
    log.warning("%s", problem)
