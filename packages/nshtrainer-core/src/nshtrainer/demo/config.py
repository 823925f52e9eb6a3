"""The demo's configuration: everything that the installed families offer for such a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.loggers.base import logger_registry
from nshtrainer.plugins.catalogue import CALLBACKS, LOGGERS, install_command
from nshtrainer.trainer.config import SLOTS, TrainerConfig

__all__ = ["PROJECT", "demo_config"]

PROJECT = "nshtrainer-demo"
"""The project of every run of the demo, by which `--resume` knows them."""

_SLOTS: dict[str, dict[str, Any]] = {
    "checkpoint_saving": {"trial": True},
    "early_stopping": {"patience": 10},
    "lr_monitor": {},
    "log_epoch": {},
    "log_norms": {"log_grad_norm": True, "log_param_norm": True},
    "auto_set_debug_flag": {},
    "auto_validate_metrics": {},
}
_CALLBACKS: dict[str, dict[str, Any]] = {
    "ema": {"decay": 0.98},
    "gradient_skipping": {"threshold": 50.0},
    "finite_checks": {},
    "epoch_timer": {},
    "print_table_metrics": {"metric_patterns": ["train_loss", "val_*", "train/grad_norm"]},
}
_LOGGERS: dict[str, dict[str, Any]] = {"csv": {}, "wandb": {"offline": True, "log_code": None}}


def demo_config(
    project_root: Path | None = None, max_epochs: int = 15
) -> tuple[TrainerConfig, dict[str, str]]:
    """The configuration of the demo.

    Args:
        project_root: Where `nshtrainer_logs` is made; None is the current folder.
        max_epochs: How long to train at most.

    Returns:
        The configuration, and what it had to leave out: callback or logger -> the reason.
    """
    missing: dict[str, str] = {}
    fields = {slot: o for slot, o in _SLOTS.items() if _is_there(SLOTS[slot], missing)}
    callbacks = [{"name": n, **o} for n, o in _CALLBACKS.items() if _is_there(n, missing)]
    loggers = [{"name": n, **o} for n, o in _LOGGERS.items() if _is_there(n, missing, logger=True)]
    config = TrainerConfig.model_validate(
        {
            "name": ["digits"],
            "project": PROJECT,
            "notes": ["a small CNN on scikit-learn's digits"],
            "seed": 1,
            "directory": {"project_root": project_root},
            "primary_metric": {"name": "val_acc", "mode": "max"},
            "max_epochs": max_epochs,
            "log_every_n_steps": 10,
            "accelerator": "cpu",
            "devices": 1,
            "enable_model_summary": False,
            "loggers": loggers,
            "callbacks": callbacks,
            **fields,
        }
    )
    return config, missing


def _is_there(name: str, missing: dict[str, str], *, logger: bool = False) -> bool:
    registry, known = (logger_registry, LOGGERS) if logger else (callback_registry, CALLBACKS)
    found = registry.resolve(name)
    if isinstance(found, type):
        return True
    dist = known[name][0]
    installed = f"{dist} is not installed; run `{install_command(dist)}`"
    missing[name] = installed if found is None else str(found)
    return False
