"""Averages the weights while training, and evaluates and saves the average."""

from __future__ import annotations

import logging
import weakref
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback, silence_unused_hooks
from nshtrainer.errors import ConfigError
from nshtrainer.runtime import saving
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientStep
from nshtrainer.runtime.weights import WeightSwap

from .both import SecondValidation
from .config import EMACallbackConfig
from .record import RECORD_KEY, other_set, read_record, write_record
from .schedule import profile_label
from .shards import whole
from .weight_ema import WeightEMA

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from nshtrainer.run.run import Run

__all__ = ["EMACallback"]

log = logging.getLogger(__name__)


class EMACallback(ConfiguredCallback[EMACallbackConfig]):
    """Keeps an exponential moving average of the trained weights and evaluates with it.

    The average begins as the weights are when training starts, and moves once per optimizer step
    that was not skipped, for the parameters of that optimizer. It stands in for the weights during
    validation, test and prediction, unless `validate_original_weights`; training goes on with the
    weights themselves, which are also what the module holds in the end, unless `average_after_fit`.

    Evaluation with a `ckpt_path` uses that file's average, and without one in it, its weights. After
    that, and after weights were loaded into the module by hand, the average is no longer that of the
    module and is forgotten.

    A checkpoint's `state_dict` holds the weights that are evaluated, weights-only files too; the
    other set is beside it, and resuming restores both. The last word of decay and interval is the
    configuration's.

    Args:
        config: The configuration.
        run: The run whose folder takes snapshots; None takes the trainer's root directory.
        options: Its fields, if no configuration is given.
    """

    config_class = EMACallbackConfig

    def __init__(
        self, config: EMACallbackConfig | None = None, run: Run | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self._run = run
        self._ema = WeightEMA(options=self.config)
        self._evaluated = WeightSwap()
        self._module: weakref.ref[LightningModule] | None = None
        self._versions: dict[str, int] = {}
        self._versions_at_end: dict[str, int] = {}
        self._named: dict[str, Tensor] = {}
        self._new_epoch = False
        self._samples = 0
        self._samples_seen: dict[int, int] = {}
        self._second: SecondValidation | None = None
        self._snapshot_step = -1
        if self.config.half_life_samples is None:
            silence_unused_hooks(self, "on_train_batch_start")
        if self.config.snapshot_every_n_steps is None:
            silence_unused_hooks(self, "on_train_batch_end")

    @property
    def ema(self) -> WeightEMA:
        """The averages."""
        return self._ema

    @property
    def average(self) -> dict[str, Tensor]:
        """Parameter or buffer name to average; live tensors, to be read only."""
        return self._ema.averages

    def __getstate__(self) -> dict[str, Any]:
        """Take the averages along, and nothing that belongs to this process."""
        state = self.__dict__.copy()
        state.update(_evaluated=WeightSwap(), _module=None, _versions={}, _second=None, _named={})
        return state

    @override
    def state_dict(self) -> dict[str, Any]:
        # The tensors are in the record. Without any state, Lightning would not warn of a run that
        # is resumed without this callback and so goes on from the average.
        return {"version": 1, "steps": self._ema.steps}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, EMACallback) and c is not self]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- set by Lightning's connector
        if others:
            raise ConfigError(
                "this trainer has several EMA callbacks, and a module can be evaluated with one "
                "average only; keep one of them. For averages with other decays beside it, set "
                "`extra_decays`."
            )
        if not self._is_of(pl_module):
            self._ema.clear()
        self._named = {}
        if stage == "fit":
            self._forget_if_changed(pl_module)
            self._versions = {}  # from here on, training changes them
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
            wanted = "weights" if self.config.validate_original_weights else "average"
            self._named = other_set(checkpoint, wanted)
            return
        path = trainer.ckpt_path
        folder = Path(path) if path is not None and Path(path).is_dir() else None
        if not read_record(checkpoint, pl_module, self._ema, folder=folder):
            self._ema.clear()
            if trainer.is_global_zero:
                log.warning(
                    "the checkpoint to resume from has no average of the weights; it begins from "
                    "the weights in the file"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average, or go on with it.

        Raises:
            ConfigError: A glob matches nothing, or snapshots are asked for with several optimizers.
        """
        self._ema.check(pl_module)
        if self.config.profiles and len(trainer.optimizers) > 1:
            raise ConfigError(
                "ema: `profiles` count the steps of one optimizer, and the module has "
                f"{len(trainer.optimizers)}; take `profiles` out"
            )
        for index, optimizer in enumerate(trainer.optimizers):
            listed = {id(p): p for group in optimizer.param_groups for p in group["params"]}
            self._ema.track(index, list(listed.values()), pl_module)
        is_lazy = any(map(torch.nn.parameter.is_lazy, pl_module.parameters()))
        if self._ema.is_empty and not is_lazy and trainer.is_global_zero:
            log.warning("there is nothing to average: no optimizer has a parameter of the module")
        self._samples, self._samples_seen = 0, {}
        self._begin_snapshots(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._new_epoch = True  # parameters are frozen and unfrozen here

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples of all ranks; only for a half-life in samples."""
        from lightning.pytorch.utilities.data import extract_batch_size

        strategy: Any = trainer.strategy
        ranks: dict[str, int] = getattr(strategy, "distributed_sampler_kwargs", None) or {}
        self._samples += extract_batch_size(batch) * ranks.get("num_replicas", 1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write snapshots; only if there are any."""
        every = self.config.snapshot_every_n_steps
        if every is not None and trainer.global_step % every == 0:
            self._write_snapshots(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.snapshot_every_n_steps is not None:
            self._write_snapshots(trainer)
        self._versions_at_end = self._versions_of(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All checkpoints are saved. Early stopping may have put the best weights into the module.
        if self.config.average_after_fit and self._versions_at_end == self._versions_of(pl_module):
            self._ema.copy_to(pl_module)

    def _transform(self, step: GradientStep) -> None:
        # Before the step: a parameter that is new to the optimizer begins as it is now.
        if self._new_epoch:
            self._new_epoch = False
            self._ema.release()
        self._track(step)

    def _track(self, step: GradientStep) -> None:
        if not self._ema.tracks(step.optimizer_index, step.parameters):
            self._ema.track(step.optimizer_index, step.parameters, step.pl_module)

    def _outcome(self, step: GradientStep, skipped: bool | Tensor) -> None:
        self._track(step)  # a raw optimizer's step, in manual optimization, comes unannounced
        index = step.optimizer_index
        samples = self._samples - self._samples_seen.get(index, 0)
        self._samples_seen[index] = self._samples
        self._ema.update(index, skipped, samples=samples)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.validate_both:
            self._second = SecondValidation(trainer, self._validate_other)
            self._second.install()

    def _validate_other(self, trainer: Trainer, run: Any) -> None:
        """Validate with the set that is not evaluated."""
        if self._ema.is_empty:
            return
        if not self.config.validate_original_weights:
            run()
            return
        try:
            self._apply(trainer, trainer.lightning_module)
            run()
        finally:
            self._ema.swap_out()

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
        if self._second is not None and not trainer.sanity_checking:
            original = self.config.validate_original_weights
            self._second.log("raw" if original else "ema", "ema" if original else "raw")

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
        self._named = {}
        self._ema.follow_devices(pl_module)

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: MutableMapping[str, Any],
        weights_only: bool,
    ) -> None:
        """Put the evaluated weights into the model's place and the other set beside them."""
        if RECORD_KEY in checkpoint or not self._is_of(pl_module):
            return
        self._forget_if_changed(pl_module)
        if self._ema.is_empty:
            return
        write_record(
            checkpoint,
            pl_module,
            self._ema,
            evaluates_average=not self.config.validate_original_weights,
            sharded=bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False)),
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

    def _swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            if trainer.ckpt_path is not None:
                self._ema.clear()
            self._forget_if_changed(pl_module)
            if self._named:
                self._apply_named(trainer, pl_module)
                return
        if not (self.config.validate_original_weights or self._ema.swapped):
            self._apply(trainer, pl_module)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(True for _ in self._ema.pairs(pl_module)):
            self._ema.swap_in(
                pl_module,
                outermost=trainer.strategy.model,
                allow_pointer=not _is_compiled(pl_module),
            )

    def _apply_named(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the set of the named checkpoint that its `state_dict` does not have."""
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        known = [name for name in self._named if name in tensors]
        self._evaluated.swap_in(
            [tensors[name] for name in known],
            [self._named[name] for name in known],
            module=trainer.strategy.model,
            allow_pointer=False,
        )

    def _forget_if_changed(self, pl_module: LightningModule) -> None:
        """Outside of a fit: forget the average if the module has got other weights since then."""
        swapped = self._ema.swapped or self._evaluated.active
        if swapped or not self._versions or self._versions == self._versions_of(pl_module):
            return
        if not self._ema.is_empty:
            log.warning(
                "the module's weights were changed after training: they are used as they are, and "
                "the average is forgotten"
            )
        self._ema.clear()
        self._versions = {}

    def _swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ema.swap_out()
        self._evaluated.swap_out()
        if trainer.state.fn != "fit":
            self._versions = self._versions_of(pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._second is not None:
            self._second.uninstall()
            self._second = None
        self._swap_out(trainer, pl_module)
        self._ema.release()
        self._versions = self._versions_of(pl_module)

    def _versions_of(self, pl_module: LightningModule) -> dict[str, int]:
        """How often each parameter was written to; what optimizers and swaps did is included."""
        averages = self._ema.averages
        return {n: p._version for n, p in pl_module.named_parameters() if n in averages}

    def _folder(self, trainer: Trainer) -> Path:
        if (chosen := self.config.snapshot_dir) is not None:
            return chosen.expanduser()
        if self._run is not None:
            return self._run.directory.subdirectory("ema")
        return Path(trainer.default_root_dir) / "ema"

    def _begin_snapshots(self, trainer: Trainer) -> None:
        """Forget snapshots of a later step: this run goes on from an earlier one."""
        if self.config.snapshot_every_n_steps is None:
            return
        from .snapshots import discard_after, list_snapshots

        folder = self._folder(trainer)
        self._snapshot_step = self._updated_at()
        # In a folder of the run's own, they are what is left of an attempt before the first save.
        is_own = self._run is not None and self.config.snapshot_dir is None
        found = self._snapshot_step == 0 and not is_own and bool(list_snapshots(folder))
        if trainer.strategy.reduce_boolean_decision(found, all=False):
            raise ConfigError(
                f"ema: {folder} has snapshots, and this run starts anew; those of two runs make no "
                "average. Resume the run that they are of, choose another `snapshot_dir`, or delete "
                "them."
            )
        if trainer.is_global_zero:
            discard_after(folder, self._snapshot_step)

    def _write_snapshots(self, trainer: Trainer) -> None:
        """Write the parameters of each profile; of buffers, a sum with negative weights is nothing."""
        from .snapshots import write_snapshot

        parameters = {name for name, _ in trainer.lightning_module.named_parameters()}
        step = self._updated_at()
        if step <= max(self._snapshot_step, 0):
            return
        self._snapshot_step = step
        for sigma_rel in self.config.profiles:
            held = self._ema.of(profile_label(sigma_rel))
            tensors = {n: whole(t) for n, t in held.items() if n in parameters}
            if trainer.is_global_zero:
                write_snapshot(
                    self._folder(trainer), step=step, sigma_rel=sigma_rel, tensors=tensors
                )

    def _updated_at(self) -> int:
        """The step of the last update, counted from `start_step`; may wait for the device."""
        steps = self._ema.steps.get(0, 0)
        return max(steps - steps % self.config.every_n_steps - self.config.start_step, 0)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether code that may know the addresses of the weights was made of a part of *module*."""
    return any(
        type(part).__name__ == "OptimizedModule"
        or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
