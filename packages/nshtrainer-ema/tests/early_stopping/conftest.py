"""Runs in which the metric is what a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from nshtrainer import MetricConfig
from nshtrainer_ema import EarlyStoppingCallback


class Scripted(Callback):
    """Logs `val/metric`: the given values, one at each validation of a fit."""

    def __init__(self, values: list[float], first: int = 0) -> None:
        self.values, self.count = values, first

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            pl_module.log("val/metric", float(self.values[self.count]))
            self.count += 1


@pytest.fixture
def metric() -> MetricConfig:
    """What `fit` logs; the lower the better."""
    return MetricConfig(name="val/metric", mode="min")


@pytest.fixture
def fit(make_model: Any, make_trainer: Any, make_loader: Any) -> Callable[..., Trainer]:
    """Train with a stopper and other callbacks on so many batches; returns the trainer.

    Each validation logs the next of the values, from the one numbered `first`.
    """

    def run(
        stopper: EarlyStoppingCallback | list[EarlyStoppingCallback],
        values: list[float],
        *callbacks: Callback,
        model: Any = None,
        batches: int = 2,
        first: int = 0,
        ckpt_path: Any = None,
        **options: Any,
    ) -> Trainer:
        stoppers = stopper if isinstance(stopper, list) else [stopper]
        options = {"max_epochs": len(values), **options}
        trainer = make_trainer(*stoppers, Scripted(values, first), *callbacks, **options)
        model = make_model() if model is None else model
        trainer.fit(model, make_loader(batches), make_loader(1), ckpt_path=ckpt_path)
        return trainer

    return run
