"""Averages the weights while training, and evaluates and saves the average."""

from __future__ import annotations

import logging
import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.errors import ConfigError
from nshtrainer.runtime import saving
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientStep
from nshtrainer.runtime.weights import WeightSwap

from .averaging import WeightAverage
from .config import EMACallbackConfig
from .record import RECORD_KEY, read_record, write_record

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["EMACallback"]

log = logging.getLogger(__name__)


class EMACallback(ConfiguredCallback[EMACallbackConfig]):
    """Keeps an exponential moving average of the trained weights and evaluates with it.

    The average begins as the weights are when training starts, and moves once per optimizer step
    that was not skipped, for the parameters of that optimizer. It stands in for the weights during
    validation, test and prediction, unless `validate_original_weights`; training goes on with the
    weights themselves, which are also what the module holds in the end. Buffers are left alone.

    Evaluation with a `ckpt_path` uses that file's weights as they are. After that, and after
    weights were loaded into the module by hand, the average is no longer that of the module and is
    forgotten.

    A checkpoint's `state_dict` holds the weights that are evaluated, weights-only files too; the
    other set is beside it, and resuming restores both. The last word of decay and interval is the
    configuration's.
    """

    config_class = EMACallbackConfig

    def __init__(self, config: EMACallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._average = WeightAverage(
            self.config.decay, self.config.every_n_steps, offload=self.config.cpu_offload
        )
        self._swap = WeightSwap()
        self._module: weakref.ref[LightningModule] | None = None
        self._versions: dict[str, int] = {}
        self._new_epoch = False

    @property
    def average(self) -> dict[str, Tensor]:
        """Parameter name to average; live tensors, to be read only."""
        return dict(self._average.averages)

    def __getstate__(self) -> dict[str, Any]:
        """Take the average along, and nothing that belongs to this process."""
        state = self.__dict__.copy()
        state.update(_swap=WeightSwap(), _module=None, _versions={})
        return state

    @override
    def state_dict(self) -> dict[str, Any]:
        # The tensors are in the record. Without any state, Lightning would not warn of a run that
        # is resumed without this callback and so goes on from the average.
        return {"version": 1, "steps": self._average.steps}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, EMACallback) and c is not self]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- set by Lightning's connector
        if others:
            raise ConfigError(
                "this trainer has several EMA callbacks, and a module can be evaluated with one "
                "average only; keep one of them."
            )
        if not self._is_of(pl_module):
            self._average.clear()
        if stage == "fit":
            self._module = weakref.ref(pl_module)
            driver = attach(trainer, self.state_key)
            driver.enable_saving(trainer)
            driver.gradients.register(
                self.state_key, transform=self._transform, outcome=self._outcome
            )

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        if not read_record(checkpoint, pl_module, self._average):
            self._average.clear()
            if trainer.is_global_zero:
                log.warning(
                    "the checkpoint to resume from has no average of the weights; it begins from "
                    "the weights in the file"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            listed = {id(p): p for group in optimizer.param_groups for p in group["params"]}
            self._average.track(index, list(listed.values()), pl_module)
        is_lazy = any(map(torch.nn.parameter.is_lazy, pl_module.parameters()))
        if not self._average.averages and not is_lazy and trainer.is_global_zero:
            log.warning("there is nothing to average: no optimizer has a parameter of the module")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._new_epoch = True  # parameters are frozen and unfrozen here

    def _transform(self, step: GradientStep) -> None:
        # Before the step: a parameter that is new to the optimizer begins as it is now.
        if self._new_epoch:
            self._new_epoch = False
            self._average.release()
        self._track(step)

    def _track(self, step: GradientStep) -> None:
        if not self._average.tracks(step.optimizer_index, step.parameters):
            self._average.track(step.optimizer_index, step.parameters, step.pl_module)

    def _outcome(self, step: GradientStep, skipped: bool | Tensor) -> None:
        self._track(step)  # a raw optimizer's step, in manual optimization, comes unannounced
        self._average.update(step.optimizer_index, skipped)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(trainer, pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Lightning calls neither the end of a validation nor teardown after an exception.
        self._leave(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer, pl_module)
        self._average.follow_devices(pl_module)

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: MutableMapping[str, Any],
        weights_only: bool,
    ) -> None:
        """Put the evaluated weights into the model's place and the other set beside them."""
        if RECORD_KEY in checkpoint or not self._average.averages or not self._is_of(pl_module):
            return
        trained = dict(zip(map(id, self._swapped(pl_module)), self._swap.originals, strict=False))
        write_record(
            checkpoint,
            pl_module,
            self._average,
            trained=trained,
            evaluates_average=not self.config.validate_original_weights,
        )

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # `trainer.save_checkpoint` after a fit, when saves emit no event any more.
        if not saving.is_installed(trainer):
            self.on_checkpoint_prepare(trainer, pl_module, checkpoint, weights_only=False)

    def _is_of(self, pl_module: LightningModule) -> bool:
        """Whether the average is that of *pl_module*; a copy of this callback takes any."""
        return self._module is None or self._module() is pl_module

    def _swapped(self, pl_module: LightningModule) -> list[Tensor]:
        return [parameter for _, parameter, _ in self._average.pairs(pl_module)]

    def _swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._forget_if_loaded(trainer, pl_module)
        if self.config.validate_original_weights or self._swap.active:
            return
        averages = [average for _, _, average in self._average.pairs(pl_module)]
        if averages:
            self._swap.swap_in(self._swapped(pl_module), averages, module=pl_module)

    def _forget_if_loaded(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of a fit: forget the average if the module has got other weights since then."""
        changed = bool(self._versions) and self._versions != self._versions_of(pl_module)
        if changed and trainer.ckpt_path is None and self._average.averages:
            log.warning(
                "the module's weights were changed after training: they are evaluated as they are, "
                "and the average is forgotten"
            )
        if changed or trainer.ckpt_path is not None:
            self._average.clear()

    def _swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.swap_out()
        if trainer.state.fn != "fit":
            self._versions = self._versions_of(pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(trainer, pl_module)
        self._average.release()
        self._versions = self._versions_of(pl_module)

    def _versions_of(self, pl_module: LightningModule) -> dict[str, int]:
        """How often each parameter was written to; what optimizers and swaps did is included."""
        return {name: p._version for name, p, _ in self._average.pairs(pl_module)}
