"""What the run-time clauses share: the options of a conformance class and how it trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger

from nshtrainer.callbacks.assembly import create_callbacks
from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.factory_guard import without_factories
from nshtrainer.trainer.config import SLOTS, TrainerConfig
from nshtrainer.trainer.lightning_arguments import lightning_kwargs
from nshtrainer.trainer.trainer import Trainer as OurTrainer

from .models import TinyDataModule, TinyModule
from .probes import Observer, quiet_and_seeded
from .promises import promise

__all__ = ["Harness"]

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Harness:
    """Options of a conformance class; see `CallbackConformance`."""

    config: ClassVar[CallbackConfigBase]
    trainer_fields: ClassVar[Mapping[str, Any]] = {}
    changes_training: ClassVar[bool] = False
    resumes_exactly: ClassVar[bool] = True
    not_compared: ClassVar[Sequence[str]] = ()
    syncs_every_step: ClassVar[bool] = False
    supports_manual_optimization: ClassVar[bool] = True
    epochs: ClassVar[int] = 2
    batches: ClassVar[int] = 4

    def module(self) -> LightningModule:
        """The module to train; override it for a callback that needs something special."""
        return TinyModule()

    def manual_module(self) -> LightningModule:
        """A module that steps its optimizers by itself; override it together with `module`."""
        return TinyModule(optimizers=2)

    def datamodule(self) -> LightningDataModule | None:
        """The data; None if the module has its own."""
        return TinyDataModule(self.batches)

    def logger(self, config: TrainerConfig) -> Logger | None:
        """The logger of plain trainers; override it for a callback that needs a certain one."""
        return None

    # ---- trainers --------------------------------------------------------------------------

    def trainer_config(
        self, folder: Path, *, with_callbacks: bool = True, **fields: Any
    ) -> TrainerConfig:
        """The run of one clause: only the callbacks under test, writing below *folder*."""
        return TrainerConfig.model_validate(
            {
                **dict.fromkeys(SLOTS),
                **_QUIET,
                "id": "conformance",
                "directory": {"project_root": folder},
                "loggers": [],
                "callbacks": [self.config.revalidated()] if with_callbacks else [],
                "max_epochs": self.epochs,
                **copy.deepcopy(dict(self.trainer_fields)),
                **fields,
            }
        )

    def callbacks_of(self, config: TrainerConfig) -> list[Callback]:
        """The callbacks of *config*, for any trainer."""
        return create_callbacks(config)

    def plain_trainer(
        self,
        config: TrainerConfig,
        callbacks: Sequence[Callback],
        first: Sequence[Callback] = (),
        last: Sequence[Callback] = (),
    ) -> Trainer:
        """A `lightning.pytorch.Trainer` with the settings of *config* and these callbacks."""
        everything = [*first, *callbacks, *last]
        kwargs = lightning_kwargs(config)
        kwargs.setdefault(
            "enable_checkpointing", any(isinstance(c, Checkpoint) for c in everything)
        )
        kwargs["default_root_dir"] = config.directory.project_root
        with without_factories():
            logger = self.logger(config) or False
            return Trainer(**kwargs, logger=logger, callbacks=everything)

    def our_trainer(self, config: TrainerConfig) -> OurTrainer:
        """An `nshtrainer.Trainer`."""
        return OurTrainer(config)

    # ---- runs ------------------------------------------------------------------------------

    def fit(
        self, trainer: Trainer, module: LightningModule | None = None, ckpt_path: Path | None = None
    ) -> LightningModule:
        """Train and return the module; nothing is caught."""
        module = self.module() if module is None else module
        with quiet_and_seeded():
            trainer.fit(module, datamodule=self.datamodule(), ckpt_path=ckpt_path)
        return module

    def expect_fit(
        self, trainer: Trainer, module: LightningModule | None = None, steps: int | None = None
    ) -> LightningModule:
        """Train, and check that the run went to its end.

        Args:
            trainer: The trainer.
            module: The module; None makes one.
            steps: How many optimizer steps are expected; None is one a batch.
        """
        module = self.fit(trainer, module)
        promise(trainer.state.finished, f"the run with {self._name} did not finish")
        expected = self.epochs * self.batches if steps is None else steps
        took_all = trainer.global_step == expected or bool(trainer.fast_dev_run)  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType, reportAttributeAccessIssue] -- Lightning does not type it
        promise(
            took_all or self.changes_training or not isinstance(module, TinyModule),
            f"the run with {self._name} took {trainer.global_step} optimizer steps, not {expected}; "
            f"set changes_training = True if that is meant",
        )
        return module

    def observed(
        self,
        folder: Path,
        *,
        with_callbacks: bool = True,
        last: Sequence[Callback] = (),
        module: LightningModule | None = None,
        ckpt_path: Path | None = None,
        **fields: Any,
    ) -> tuple[Observer, Trainer, LightningModule]:
        """Train a plain trainer with, or without, the callbacks under test."""
        config = self.trainer_config(folder, with_callbacks=with_callbacks, **fields)
        observer = Observer()
        trainer = self.plain_trainer(config, self.callbacks_of(config), [observer], last)
        return observer, trainer, self.fit(trainer, module, ckpt_path)

    @property
    def _name(self) -> str:
        return type(self.config).__qualname__
