"""A configuration that uses every callback and logger of every first-party family."""

from __future__ import annotations

from typing import Any

__all__ = ["every_family"]

_METRIC = {"name": "val_loss", "mode": "min"}


def every_family() -> dict[str, Any]:
    """The configuration as plain data, as a file would give it."""
    return {
        "name": ["everything"],
        "project": "benchmarks",
        "max_epochs": 10,
        "primary_metric": _METRIC,
        "checkpoint_saving": {
            "checkpoint_callbacks": [
                {"name": "best_checkpoint", "topk": 3},
                {"name": "last_checkpoint", "save_on_time_interval": "PT30M"},
                {"name": "on_exception_checkpoint"},
            ]
        },
        "early_stopping": {"patience": 5},
        "lr_monitor": {"logging_interval": "step"},
        "log_epoch": {},
        "log_norms": {"log_grad_norm": True, "log_param_norm": True},
        "shared_parameters": {},
        "auto_set_debug_flag": {},
        "auto_validate_metrics": {"metrics": [_METRIC]},
        "callbacks": [
            {"name": "ema", "decay": 0.999},
            {"name": "gradient_skipping", "threshold": 100.0},
            {"name": "finite_checks"},
            {"name": "epoch_timer"},
            {"name": "print_table_metrics"},
            {"name": "act_save"},
            {"name": "wandb_checkpoints"},
        ],
        "loggers": [
            {"name": "csv"},
            {"name": "tensorboard"},
            {
                "name": "wandb",
                "offline": True,
                "watch": {"log_freq": 500},
                "log_code": {"exclude": ["data/*"]},
            },
        ],
    }
