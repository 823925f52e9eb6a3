"""Monitoring and debugging: norms, learning rates, required metrics, tables, timers, finite checks.

The configurations cost no torch; the callbacks import Lightning when they are first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .debug_flag.config import DebugFlagCallbackConfig
from .epoch_timer.config import EpochTimerCallbackConfig
from .finite_checks.config import FiniteChecksCallbackConfig
from .log_epoch.config import LogEpochCallbackConfig
from .lr_monitor.config import LearningRateMonitorConfig
from .metric_validation.config import MetricValidationCallbackConfig
from .norm_logging.config import NormLoggingCallbackConfig
from .print_table.config import PrintTableMetricsCallbackConfig

if TYPE_CHECKING:
    from .debug_flag.callback import DebugFlagCallback
    from .epoch_timer.callback import EpochTimerCallback
    from .finite_checks.callback import FiniteChecksCallback
    from .log_epoch.callback import LogEpochCallback
    from .lr_monitor.callback import LearningRateMonitorCallback
    from .metric_validation.callback import MetricValidationCallback
    from .norm_logging.callback import NormLoggingCallback
    from .print_table.callback import PrintTableMetricsCallback

__all__ = [
    "DebugFlagCallback",
    "DebugFlagCallbackConfig",
    "EpochTimerCallback",
    "EpochTimerCallbackConfig",
    "FiniteChecksCallback",
    "FiniteChecksCallbackConfig",
    "LearningRateMonitorCallback",
    "LearningRateMonitorConfig",
    "LogEpochCallback",
    "LogEpochCallbackConfig",
    "MetricValidationCallback",
    "MetricValidationCallbackConfig",
    "NormLoggingCallback",
    "NormLoggingCallbackConfig",
    "PrintTableMetricsCallback",
    "PrintTableMetricsCallbackConfig",
]

_RUN_TIME = {
    "DebugFlagCallback": ".debug_flag.callback",
    "EpochTimerCallback": ".epoch_timer.callback",
    "FiniteChecksCallback": ".finite_checks.callback",
    "LearningRateMonitorCallback": ".lr_monitor.callback",
    "LogEpochCallback": ".log_epoch.callback",
    "MetricValidationCallback": ".metric_validation.callback",
    "NormLoggingCallback": ".norm_logging.callback",
    "PrintTableMetricsCallback": ".print_table.callback",
}


def __getattr__(name: str) -> Any:
    if name in _RUN_TIME:
        return getattr(import_module(_RUN_TIME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
