"""The one core callback behind the run-time mechanisms, attached by whoever needs one of them.

It works on our `Trainer` and on a plain `lightning.pytorch.Trainer`. It sits after all other
callbacks and before checkpoints, so that what they monitor is there, and is gone after the run.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback, Checkpoint
from typing_extensions import override

from nshtrainer.callbacks.callback import HOT_HOOKS
from nshtrainer.runtime.gradients import GradientPipeline
from nshtrainer.runtime.process_group import close_at_exit
from nshtrainer.runtime.step_metrics import StepMetrics, fetch, is_logging_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["RuntimeCallback", "attach", "find_driver"]

log = logging.getLogger(__name__)


def attach(trainer: Trainer, owner: str) -> RuntimeCallback:
    """Return the trainer's driver, adding it if this is the first call of the run.

    Call it in a callback's `setup` hook (or a module's) at each run: the driver leaves the
    trainer in teardown, or after an exception, and with it whatever was registered.

    Args:
        trainer: Ours or a plain one.
        owner: Who asks, for the log.
    """
    driver = find_driver(trainer)
    if driver is None:
        close_at_exit()
        driver = RuntimeCallback()
        # A new list: Lightning is iterating over the present one, which is the caller's own.
        callbacks = _callbacks(trainer)
        place = next(
            (i for i, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)),
            len(callbacks),
        )
        trainer.callbacks = [*callbacks[:place], driver, *callbacks[place:], _Closer(driver)]  # pyright: ignore[reportAttributeAccessIssue] -- set by Lightning's connector
    log.debug("runtime driver attached for %s", owner)
    return driver


def find_driver(trainer: Trainer) -> RuntimeCallback | None:
    """Return the driver attached to *trainer*, if there is one."""
    return next((c for c in _callbacks(trainer) if isinstance(c, RuntimeCallback)), None)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType] -- as above


class RuntimeCallback(Callback):
    """Drives the gradient pipeline and the step metrics of one run; made by `attach`.

    Has no state to save. A copy (pickle, deepcopy) is as new: registered clients stay behind,
    since the callbacks that own them attach again in `setup`.
    """

    def __init__(self) -> None:
        self.gradients = GradientPipeline(self._choose_hooks)
        self.step_metrics = StepMetrics(self._choose_hooks)
        self._saving = False
        self._choose_hooks()

    @override
    def __reduce__(self) -> tuple[type[RuntimeCallback], tuple[()]]:
        """Copy as new: hooks, tensors and clients belong to this process and run."""
        return type(self), ()

    @property
    @override
    def state_key(self) -> str:
        return "nshtrainer.runtime"

    def enable_saving(self, trainer: Trainer) -> None:
        """Emit `on_checkpoint_prepare` before each save of this run; idempotent."""
        from nshtrainer.runtime import saving

        saving.install(trainer)
        self._saving = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gradients.observe_optimizers(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.gradients.before_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.gradients.finish_batch()
        counts = self.gradients.pending_counts() if is_logging_step(trainer) else []
        values = self.step_metrics.finish_batch(trainer, counts)
        if counts:
            self.gradients.report_counts(trainer, values)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if counts := self.gradients.pending_counts():
            self.gradients.report_counts(trainer, fetch(counts))

    def close(self, trainer: Trainer) -> None:
        """Undo everything: hooks, buffers, the wrapped save, and the driver's place in the list."""
        try:
            self.gradients.close()
        finally:
            self.step_metrics.reset()
            self._choose_hooks()
            trainer.callbacks = [  # pyright: ignore[reportAttributeAccessIssue] -- as above
                callback
                for callback in _callbacks(trainer)
                if callback is not self and not isinstance(callback, _Closer)
            ]
            if self._saving:
                self._saving = False
                from nshtrainer.runtime import saving

                saving.uninstall(trainer)

    def _choose_hooks(self) -> None:
        """Switch on the hooks that are needed now; the others are not callable."""
        if not hasattr(self, "step_metrics"):
            return  # still being made
        wanted: set[str] = set()
        if self.gradients.active:
            wanted |= {"on_before_optimizer_step", "on_train_batch_end"}
        if self.step_metrics.used:
            wanted.add("on_train_batch_end")
        for hook in HOT_HOOKS:
            if hook in wanted:
                self.__dict__.pop(hook, None)
            else:
                self.__dict__[hook] = None


class _Closer(Callback):
    """Closes the driver after every other callback, checkpoints included, is done.

    Those still save in `on_exception` and `teardown`, where the wrapped save has to be in place.
    """

    def __init__(self, driver: RuntimeCallback) -> None:
        self._driver = driver
        self.__dict__.update(dict.fromkeys(HOT_HOOKS))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._driver.close(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Lightning does not call teardown after an exception.
        self._driver.close(trainer)
