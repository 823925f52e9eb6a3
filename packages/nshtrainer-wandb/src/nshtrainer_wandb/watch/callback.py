"""`WandbWatchCallback`: `wandb.watch` while the model is trained, and only then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks

from .config import WandbWatchCallbackConfig
from .histogram import histogram

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbWatchCallback"]

log = logging.getLogger(__name__)


class WandbWatchCallback(ConfiguredCallback[WandbWatchCallbackConfig]):
    """Watches the module from the start of training to its end, by an exception too.

    Runs on rank zero. The module is watched anew in each `fit`; nothing stays behind on it.

    Args:
        config: The configuration.
        options: Its fields, if no configuration is given.
    """

    config_class: ClassVar[type[CallbackConfigBase]] = WandbWatchCallbackConfig

    def __init__(self, config: WandbWatchCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._watched: tuple[Run, nn.Module] | None = None
        self._batches = 0
        if self.config.log not in ("parameters", "all"):
            silence_unused_hooks(self, "on_train_batch_end")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        config = self.config
        if not config.enabled or trainer.fast_dev_run or not trainer.is_global_zero:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set by Lightning's connector
            return
        if config.log is None and not config.log_graph:
            return
        logger = next((item for item in trainer.loggers if isinstance(item, WandbLogger)), None)
        if logger is None:
            log.warning(
                "the callback 'wandb_watch' records nothing: the trainer has no W&B logger; add one, "
                "or remove the callback"
            )
            return
        choose = getattr(pl_module, "wandb_log_module", None)
        module = cast("nn.Module | None", choose() if callable(choose) else None) or pl_module
        if hasattr(module, "_wandb_hook_names"):
            log.info("%s is watched already, and left as it is", type(module).__name__)
            return
        self._watch(cast("Run", logger.experiment), module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watched is None:
            return
        self._batches += 1
        if self._batches % self.config.log_freq:
            return
        # W&B's own way hangs on the module's `forward`, which a `training_step` need not call.
        run, module = self._watched
        found = ((name, histogram(value)) for name, value in module.named_parameters())
        run.log({f"parameters/{n}": h for n, h in found if h is not None}, commit=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwatch()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._unwatch()  # Lightning does not call teardown after an exception

    def _watch(self, run: Run, module: nn.Module) -> None:
        _forget(module)
        config = self.config
        self._watched, self._batches = (run, module), 0
        hooked = "gradients" if config.log in ("gradients", "all") else None
        if hooked is None and not config.log_graph:
            return
        try:
            # W&B counts watched models up over all runs of a process and puts the number into the
            # names; idx=0 keeps the names of each run's first model the same.
            run.watch(  # pyright: ignore[reportUnknownMemberType] -- wandb names a type that torch has not
                module, log=hooked, log_freq=config.log_freq, idx=0, log_graph=config.log_graph
            )
        except (RuntimeError, ValueError) as error:
            log.warning("%s cannot be watched by W&B: %s", type(module).__name__, error)
            self._unwatch()

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, None
        if watched is None:
            return
        run, module = watched
        if not hasattr(module, "_wandb_hook_names"):
            return
        try:
            run.unwatch([module])
        except Exception as error:  # noqa: BLE001 -- must not hide the exception that ends the run
            log.warning("W&B left hooks on %s: %s", type(module).__name__, error)
        _forget(module)


def _forget(module: nn.Module) -> None:
    """Remove the marks with which W&B refuses to watch a module again; it does not do so itself."""
    for part in module.modules():
        for mark in ("_wandb_watch_called", "_wandb_hook_names"):
            part.__dict__.pop(mark, None)
