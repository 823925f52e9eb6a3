"""Hooks: what this plugin does beside providing a callback."""

from __future__ import annotations

from typing import Any

from nshtrainer import CallbackConfigBase, TrainerConfig, hookimpl

from .config import HelloCallbackConfig


@hookimpl
def nshtrainer_default_callbacks(config: TrainerConfig) -> list[CallbackConfigBase]:
    """Say hello in every run whose config has `plugins: {defaults: [nshtrainer-hello]}`."""
    return [HelloCallbackConfig(greeting=f"Hello from {config.full_name or 'a run'}")]


@hookimpl
def nshtrainer_run_metadata(config: TrainerConfig) -> dict[str, Any]:
    """Record who was greeted."""
    return {"greets": config.full_name}
