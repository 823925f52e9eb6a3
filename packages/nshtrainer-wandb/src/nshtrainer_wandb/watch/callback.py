"""`WandbWatchCallback`: histograms of gradients and parameters while the model is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientStep
from nshtrainer.runtime.optimizer_hooks import plain_name
from nshtrainer.runtime.step_metrics import batches_that_stepped
from nshtrainer_wandb.logger.finding import find_wandb_logger

from .config import WandbWatchCallbackConfig
from .histogram import count_histograms, is_sharded
from .hooks import HookedModule, is_compiled, is_watched

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbWatchCallback"]

log = logging.getLogger(__name__)


class WandbWatchCallback(ConfiguredCallback[WandbWatchCallbackConfig]):
    """Watches the module from the start of training to its end, by an exception too.

    Rank zero records; the others take part where tensors are sharded. The module is watched anew in
    each `fit`; nothing stays behind on it. A problem with W&B is a warning.

    Args:
        config: The configuration.
        options: Its fields, if no configuration is given.
    """

    config_class: ClassVar[type[CallbackConfigBase]] = WandbWatchCallbackConfig

    def __init__(self, config: WandbWatchCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts anew: run, module and handles belong to this process."""
        return {**self.__dict__, **_NOTHING_WATCHED}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()
        if stage == "fit" and self._is_wanted(trainer) and find_wandb_logger(trainer) is not None:
            attach(trainer, self.state_key)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_wanted(trainer):
            return
        logger = find_wandb_logger(trainer, "the callback 'wandb_watch' records nothing")
        if logger is None:
            return
        choose = getattr(pl_module, "wandb_log_module", None)
        module = cast("nn.Module | None", choose() if callable(choose) else None) or pl_module
        if trainer.is_global_zero:
            self._run = cast("Run", logger.experiment)
        self._watch(trainer, pl_module, module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take part in the gradient pipeline where a record is due, so that other steps run without it."""
        is_due = self._is_due(batches_that_stepped(trainer)) or bool(self._overdue)
        if is_due != self._listens:
            self._listen(trainer, is_due)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and self._module is not None and self._index < 0:
            log.info(
                "W&B has no histograms of this run, which ended before its step %s; lower `log_freq` "
                "of wandb_watch",
                self.config.log_freq,
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._forget()  # Lightning does not call teardown after an exception

    def _is_wanted(self, trainer: Trainer) -> bool:
        config = self.config
        asks = config.log is not None or config.log_graph
        return config.enabled and asks and not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set by Lightning's connector

    def _forget(self) -> None:
        if (hooked := self.__dict__.get("_hooked")) is not None:
            hooked.release()
        self.__dict__.update(_NOTHING_WATCHED)
        self._recorded, self._overdue = set(), set()
        silence_unused_hooks(self, "on_train_batch_start")

    def _watch(self, trainer: Trainer, pl_module: LightningModule, module: nn.Module) -> None:
        config = self.config
        log_gradients = config.log in ("gradients", "all")
        with_hooks, log_graph = config.method == "hooks", config.log_graph
        if (with_hooks or log_graph) and is_compiled(pl_module):
            with_hooks = log_graph = False
            if trainer.is_global_zero:
                log.warning(
                    "%s is compiled, and W&B's hooks do not work there: gradients are read at the "
                    "optimizer's step, and no graph is recorded. Set `method: optimizer_step` and "
                    "`log_graph: false` of wandb_watch to say so.",
                    type(module).__name__,
                )
        if self._run is not None and is_watched(module):
            # By `wandb.watch` in the user's code; the other ranks cannot know of it.
            log.info("%s is watched already, and left as it is", type(module).__name__)
            self._run = None
        self._log_gradients = log_gradients and not with_hooks
        self._log_parameters = config.log in ("parameters", "all")
        if self._log_gradients or self._log_parameters:
            self._module = module
            self.__dict__.pop("on_train_batch_start", None)
        hook_gradients = with_hooks and log_gradients
        if self._run is not None and (hook_gradients or log_graph):
            self._hooked = HookedModule(self._run, module)
            self._hooked.watch(
                log_freq=config.log_freq, log_gradients=hook_gradients, log_graph=log_graph
            )

    def _is_due(self, index: int) -> bool:
        """Whether the step of batch *index* is one to record, by the count of those that stepped."""
        return (index + 1) % self.config.log_freq == 0

    def _listen(self, trainer: Trainer, is_due: bool) -> None:
        self._listens = is_due
        pipeline = attach(trainer, self.state_key).gradients
        if is_due:
            pipeline.register(self.state_key, observe=self._observe)
            pipeline.observe_optimizers(trainer)
            return
        pipeline.unregister(self.state_key)
        if not pipeline.active:
            pipeline.reset()  # else its hooks on the optimizers go on being called

    def _observe(self, step: GradientStep) -> None:
        index, optimizer = batches_that_stepped(step.trainer), step.optimizer_index
        if not (self._is_due(index) or optimizer in self._overdue):
            return
        if index != self._index:
            self._index, self._recorded = index, set()
        if optimizer in self._recorded:
            return
        if bool(step.skipped):  # read from the device, which is waited for anyway
            self._overdue.add(optimizer)
            return
        self._overdue.discard(optimizer)
        tensors = self._tensors(step)
        self._recorded.add(optimizer)
        self._record(index, tensors)

    def _tensors(self, step: GradientStep) -> dict[str, Tensor]:
        """What is recorded of *step*, by the names of the records."""
        module = self._module or step.pl_module
        named = [(plain_name(name), p) for name, p in module.named_parameters()]
        tensors: dict[str, Tensor] = {}
        if self._log_gradients:
            own = set(map(id, step.parameters))
            grads = ((name, p.grad) for name, p in named if id(p) in own)
            tensors = {f"gradients/{name}": grad for name, grad in grads if grad is not None}
        if self._log_parameters and not self._recorded:  # once, whatever the optimizers
            tensors |= {f"parameters/{name}": p for name, p in named}
        if not step.trainer.is_global_zero:
            return {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        return tensors

    def _record(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        run = self._run
        try:
            found = count_histograms(tensors, fetch=run is not None)
            if run is not None and found:
                from wandb import Histogram

                shown = {n: Histogram(np_histogram=(h.counts, h.edges)) for n, h in found.items()}  # pyright: ignore[reportArgumentType] -- lists will do
                run.log({**shown, "trainer/global_step": index})
        except Exception as error:  # noqa: BLE001 -- whatever it is, training goes on
            if not self._has_failed:
                log.warning(
                    "W&B gets no histograms of this step: %s: %s. Further failures are not "
                    "reported; set `watch: null` of the W&B logger to leave them out.",
                    type(error).__name__,
                    error,
                )
            self._has_failed = True

    _run: Run | None
    _module: nn.Module | None
    _hooked: HookedModule | None
    _index: int
    """Batch of the last record."""
    _recorded: set[int]
    """Optimizers that have been recorded in it."""
    _overdue: set[int]
    """Optimizers whose record is made at their next step, since the one it was due at was skipped."""
    _listens: bool
    """Whether it is registered with the gradient pipeline."""
    _log_gradients: bool
    _log_parameters: bool
    _has_failed: bool


_NOTHING_WATCHED: dict[str, Any] = {
    "_run": None, "_module": None, "_hooked": None, "_index": -1, "_listens": False,
    "_log_gradients": False, "_log_parameters": False, "_has_failed": False,
}  # fmt: skip
