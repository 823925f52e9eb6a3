"""What the first-party families provide, so that a missing one can be named with its command."""

from __future__ import annotations

__all__ = ["CALLBACKS", "CLASSES", "CORE", "FAMILIES", "LOGGERS", "install_command"]

CORE = "nshtrainer-core"

CALLBACKS: dict[str, tuple[str, str]] = {
    "act_save": ("nshtrainer-wandb", "ActSaveConfig"),
    "best_checkpoint": ("nshtrainer-checkpoint", "BestCheckpointCallbackConfig"),
    "checkpoint_saving": ("nshtrainer-checkpoint", "CheckpointSavingConfig"),
    "debug_flag": ("nshtrainer-monitoring", "DebugFlagCallbackConfig"),
    "early_stopping": ("nshtrainer-ema", "EarlyStoppingCallbackConfig"),
    "ema": ("nshtrainer-ema", "EMACallbackConfig"),
    "epoch_timer": ("nshtrainer-monitoring", "EpochTimerCallbackConfig"),
    "finite_checks": ("nshtrainer-monitoring", "FiniteChecksCallbackConfig"),
    "gradient_skipping": ("nshtrainer-ema", "GradientSkippingCallbackConfig"),
    "last_checkpoint": ("nshtrainer-checkpoint", "LastCheckpointCallbackConfig"),
    "learning_rate_monitor": ("nshtrainer-monitoring", "LearningRateMonitorConfig"),
    "log_epoch": ("nshtrainer-monitoring", "LogEpochCallbackConfig"),
    "metric_validation": ("nshtrainer-monitoring", "MetricValidationCallbackConfig"),
    "norm_logging": ("nshtrainer-monitoring", "NormLoggingCallbackConfig"),
    "on_exception_checkpoint": ("nshtrainer-checkpoint", "OnExceptionCheckpointCallbackConfig"),
    "print_table_metrics": ("nshtrainer-monitoring", "PrintTableMetricsCallbackConfig"),
    "shared_parameters": ("nshtrainer-ema", "SharedParametersCallbackConfig"),
    "wandb_checkpoints": ("nshtrainer-wandb", "WandbCheckpointsCallbackConfig"),
    "wandb_upload_code": ("nshtrainer-wandb", "WandbUploadCodeCallbackConfig"),
    "wandb_watch": ("nshtrainer-wandb", "WandbWatchCallbackConfig"),
}
"""Callback name -> distribution and class name."""

LOGGERS: dict[str, tuple[str, str]] = {
    "csv": (CORE, "CSVLoggerConfig"),
    "tensorboard": (CORE, "TensorboardLoggerConfig"),
    "wandb": ("nshtrainer-wandb", "WandbLoggerConfig"),
}
"""Logger name -> distribution and class name."""

CLASSES: dict[str, str] = {
    cls: dist for table in (CALLBACKS, LOGGERS) for dist, cls in table.values()
}
"""Config class name -> distribution."""

FAMILIES = tuple(sorted(set(CLASSES.values()) - {CORE}))
"""The first-party satellites."""


def install_command(dist: str) -> str:
    """The command that installs *dist*."""
    return f"pip install {dist}"
