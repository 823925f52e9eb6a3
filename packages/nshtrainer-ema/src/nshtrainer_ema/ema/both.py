"""Validates a second time in a fit, with other weights, before each validation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["SecondValidation"]


class SecondValidation:
    """Has the validation of a fit run twice, the first time unseen by callbacks and loggers.

    The module cannot tell the two apart: all of its hooks are called in both. Random numbers of the
    first are not missed by the second, nor by training.

    Args:
        trainer: The trainer of the fit.
        prepare: Called with the trainer and a function that validates; puts other weights in
            around that, or does not call it.
    """

    def __init__(
        self, trainer: Trainer, prepare: Callable[[Trainer, Callable[[], None]], None]
    ) -> None:
        self._trainer = trainer
        self._prepare = prepare
        self._loop: Any = trainer.fit_loop.epoch_loop.val_loop
        self._metrics: dict[str, Tensor] = {}

    def install(self) -> None:
        """Stand in for the loop's `run` until `uninstall`."""
        self._loop.__dict__["run"] = self._run

    def uninstall(self) -> None:
        """Leave the loop as it was."""
        if self._loop.__dict__.get("run") == self._run:
            del self._loop.__dict__["run"]

    def log(self, own: str, other: str) -> None:
        """Log both results: those of the validation that ends under *own*, as `own/<name>`."""
        trainer: Any = self._trainer
        results = trainer._results
        if results is None:
            return
        evaluated = dict(results.metrics(on_step=False)["callback"])
        both = {f"{own}/{name}": value for name, value in evaluated.items()}
        both.update({f"{other}/{name}": value for name, value in self._metrics.items()})
        connector = trainer._logger_connector
        connector._callback_metrics.update(both)
        connector.log_metrics({**both}, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _run(self) -> Any:
        run = cast("Callable[[Any], Any]", type(self._loop).run)
        if not self._trainer.sanity_checking:
            self._metrics = {}
            self._prepare(self._trainer, lambda: self._validate(run))
        return run(self._loop)

    def _validate(self, run: Callable[[Any], Any]) -> None:
        with isolate_rng(), _unseen(self._trainer):
            run(self._loop)
            seen = self._trainer.callback_metrics
            self._metrics = {name: value.detach().clone() for name, value in seen.items()}


@contextlib.contextmanager
def _unseen(trainer: Any) -> Generator[None]:
    """No callback is called, nothing is logged, and the trainer's own metrics stay as they are."""
    connector = trainer._logger_connector
    callbacks, loggers = trainer.callbacks, trainer.loggers
    held = {
        name: dict(getattr(connector, name))
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    }
    for name in held:
        setattr(connector, name, {})
    first = connector._first_loop_iter
    trainer.callbacks, trainer.loggers = [], []
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
        connector._first_loop_iter = first
        for name, metrics in held.items():
            setattr(connector, name, metrics)
