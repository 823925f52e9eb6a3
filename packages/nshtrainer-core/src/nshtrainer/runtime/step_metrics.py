"""Step metrics: buffered during a step, sent as one call per logger with Lightning's own x-axis.

`LightningModule.log` rebuilds a metric object for each name and step; for hundreds of names
(norms of every parameter) that dominates the step. Here a name costs a dictionary entry, and all
values reach the host in one transfer, at logging steps only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nshtrainer.errors import NshTrainerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning.pytorch import Trainer

__all__ = [
    "NoDriverError",
    "StepMetrics",
    "batches_that_stepped",
    "fetch",
    "is_logging_step",
    "log_step_metrics",
]


class NoDriverError(NshTrainerError, RuntimeError):
    """Step metrics were logged on a trainer to which the runtime driver was not attached."""


def is_logging_step(trainer: Trainer) -> bool:
    """Whether Lightning sends step metrics of the current training batch to the loggers.

    Its own rule: every `log_every_n_steps` batches that step an optimizer, each one in a
    `fast_dev_run`, and the one at which training stops. The answer holds from
    `on_train_batch_start` to `on_train_batch_end`; outside of training it is false.
    """
    if not trainer.training:
        return False
    epoch_loop = trainer.fit_loop.epoch_loop
    accumulates = epoch_loop._should_accumulate()  # pyright: ignore[reportPrivateUsage] -- Lightning has no public form of its logging rule
    if accumulates and trainer.lightning_module.automatic_optimization:
        return False
    if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set by Lightning's connector
        return True
    every = cast("int", trainer.log_every_n_steps)  # pyright: ignore[reportAttributeAccessIssue] -- as above
    if every == 0:
        return False
    return (batches_that_stepped(trainer) + 1) % every == 0 or trainer.should_stop


def log_step_metrics(
    trainer: Trainer,
    metrics: Mapping[str, Tensor | float],
    *,
    totals: Iterable[str] = (),
    prog_bar: Iterable[str] = (),
) -> None:
    """Log *metrics* of the current training batch; costs no transfer until the batch ends.

    Args:
        trainer: One that `nshtrainer.runtime.driver.attach` was called for in `setup`.
        metrics: Name to number; tensors with one element, on any device, not changed in place
            until the batch ends.
        totals: Names that also go into `trainer.callback_metrics`, for early stopping,
            checkpoints and tables; with or without loggers.
        prog_bar: Names that also go into `trainer.progress_bar_metrics`, as numbers, on rank zero; with
            or without loggers. They stay there until they are logged again, and a progress bar
            shows them when it is drawn next, after the batch.

    Sent at `on_train_batch_end` of a logging step, after the callbacks that come before
    checkpoints; called later than that, at once. At other steps everything is dropped, so ask
    `is_logging_step` (or `GradientStep.will_log`) before computing anything. On ranks other than
    zero nothing is transferred, and metrics are not reduced over ranks.

    Raises:
        NoDriverError: `attach` was not called.
        ValueError: A tensor does not have exactly one element.
    """
    from nshtrainer.runtime.driver import find_driver

    driver = find_driver(trainer)
    if driver is None:
        raise NoDriverError(
            f"step metrics {sorted(metrics)} were logged, but no runtime driver is attached to "
            "this trainer; a callback attaches it in its setup hook. Call "
            "nshtrainer.runtime.driver.attach(trainer, owner) there."
        )
    driver.step_metrics.log(trainer, metrics, totals=totals, prog_bar=prog_bar)


class StepMetrics:
    """The buffer of one trainer.

    Args:
        changed: Called at the first use, so that the driver's hook is switched on.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self.used = False
        """Whether anything was logged in this run."""
        self._metrics: dict[str, Tensor | float] = {}
        self._totals: set[str] = set()
        self._prog_bar: set[str] = set()
        self._batch = -1
        self._flushed_batch = -1

    def log(
        self,
        trainer: Trainer,
        metrics: Mapping[str, Tensor | float],
        *,
        totals: Iterable[str] = (),
        prog_bar: Iterable[str] = (),
    ) -> None:
        """See `log_step_metrics`."""
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"step metric {name!r} has shape {tuple(value.shape)}; a metric is one "
                    "number. Reduce it, or log one name per element."
                )
        batch = _batch(trainer)
        if batch != self._batch:
            self.discard()  # of a batch that never reached its end
            self._batch = batch
        self._metrics.update(metrics)
        self._totals.update(totals)
        self._prog_bar.update(prog_bar)
        late = batch == self._flushed_batch
        if not self.used:
            self.used = True
            self._changed()
            # The driver's hook was off until now, and may already have been passed over.
            late = late or trainer.lightning_module._current_fx_name == "on_train_batch_end"  # pyright: ignore[reportPrivateUsage] -- the only sign of it
        if late:
            self.finish_batch(trainer)

    def finish_batch(self, trainer: Trainer, extra: Sequence[Tensor] = ()) -> list[float]:
        """Send what is buffered if this is a logging step, else drop it.

        Args:
            trainer: At `on_train_batch_end`.
            extra: Tensors to fetch in the same transfer, on every rank.

        Returns:
            *extra* as numbers.
        """
        self._flushed_batch = _batch(trainer)
        if self._metrics and is_logging_step(trainer):
            return self._send(trainer, extra)
        self.discard()
        return fetch(list(extra))

    def discard(self) -> None:
        """Drop what is buffered."""
        self._metrics = {}
        self._totals = set()
        self._prog_bar = set()

    def reset(self) -> None:
        """Start as before the first use."""
        self.__init__(self._changed)

    def _send(self, trainer: Trainer, extra: Sequence[Tensor]) -> list[float]:
        metrics, totals = self._metrics, self._totals
        shown = self._prog_bar.intersection(metrics)
        self.discard()
        connector = trainer._logger_connector  # pyright: ignore[reportPrivateUsage] -- the public properties recompute every metric of the module
        logged: dict[str, Tensor] = {
            name: _detached(value) if isinstance(value, Tensor) else torch.tensor(value)
            for name, value in metrics.items()
        }
        connector._logged_metrics.update(logged)  # pyright: ignore[reportPrivateUsage] -- as above
        connector._callback_metrics.update(  # pyright: ignore[reportPrivateUsage] -- as above
            {name: logged[name] for name in totals if name in logged}
        )
        if not ((trainer.loggers or shown) and trainer.is_global_zero):
            return fetch(list(extra))
        wanted = metrics.keys() if trainer.loggers else shown
        tensors = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, Tensor) and name in wanted
        }
        values = fetch([*extra, *tensors.values()])
        numbers: dict[str, float] = dict(zip(tensors, values[len(extra) :], strict=True))
        scalars = {name: numbers.get(name, value) for name, value in metrics.items()}
        connector._progress_bar_metrics.update(  # pyright: ignore[reportPrivateUsage] -- as above
            {name: _as_shown(metrics[name], scalars[name]) for name in metrics if name in shown}
        )
        scalars.setdefault("epoch", trainer.current_epoch)
        step = _x_axis(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(metrics=scalars, step=step)  # pyright: ignore[reportArgumentType] -- tensors are numbers by now
        return values[: len(extra)]


def _detached(value: Tensor) -> Tensor:
    """Without autograd; a view is not made of what has none, for hundreds of norms it would add up."""
    return value.detach() if value.requires_grad else value


def _as_shown(value: Tensor | float, number: Any) -> float:
    """Return *number*, as which *value* was fetched; a count without decimals."""
    is_count = isinstance(value, Tensor) and not value.is_floating_point()
    return int(number) if is_count else number


def _batch(trainer: Trainer) -> int:
    """Return a number that no other training batch of this fit has."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def batches_that_stepped(trainer: Trainer) -> int:
    """Return Lightning's x-axis of step metrics: batches that stepped, whatever the optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage] -- not public


def _x_axis(trainer: Trainer) -> int:
    """Return the x-axis of this batch: what the module logs as `step`, as Lightning does, or its own."""
    results: Any = trainer._results  # pyright: ignore[reportPrivateUsage] -- not public
    if results is not None and any(key.rpartition(".")[2] == "step" for key in results):
        chosen = trainer._logger_connector.metrics["log"].get("step")  # pyright: ignore[reportPrivateUsage] -- as above
        if chosen is not None:
            return int(chosen)
    return batches_that_stepped(trainer)


@torch.no_grad()
def fetch(tensors: list[Tensor]) -> list[float]:
    """Return 0-dim *tensors* as numbers: one transfer per device, whatever their dtypes.

    Waits for the device. Integers are exact to 2**53 (2**24 on devices without fp64).
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    by_device: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for (device, _), members in groups.items():
        indices, parts = by_device.setdefault(device, ([], []))
        indices += members
        wide = torch.float32 if device.type == "mps" else torch.float64
        numbers = [t if t.dim() == 0 else t.reshape(()) for t in map(tensors.__getitem__, members)]
        parts.append(torch.stack(numbers).to(wide))
    result = [0.0] * len(tensors)
    for indices, parts in by_device.values():
        values = cast("list[float]", torch.cat(parts).tolist())  # pyright: ignore[reportUnknownMemberType] -- torch's stub
        for index, value in zip(indices, values, strict=True):
            result[index] = value
    return result
