"""Whole runs to measure: two nets, data that costs nothing, and trainers with the same settings."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.demo.config import demo_config
from nshtrainer.demo.digits import DigitsModel
from nshtrainer.trainer.config import SLOTS

from .every_family import every_family
from .method import Sample

__all__ = [
    "BATCH_SIZE",
    "DYNAMICS",
    "EVERYTHING",
    "EVERY_STEP",
    "NETS",
    "STARTS",
    "STEPS",
    "STEPS_TO_RECORD",
    "TRAINERS",
    "WANDB",
    "WATCH_EVERY",
    "WITH_WANDB",
    "DeepModel",
    "MakeTrainer",
    "Stamps",
    "loader",
    "on_gpu",
    "quiet",
]

BATCH_SIZE = 64
_LOG_EVERY = 50
WATCH_EVERY = 1000
"""Steps between two records of `wandb_watch`, by default."""
STEPS_TO_RECORD = 58
"""Which step of a run makes a record, of those that are compared with and without W&B. The 8th is logged
before, since the first thing that a process logs lets W&B import a tenth of a second's worth."""
_DECAY = 0.999

# Private in torch; there is no public form of the foreach functions.
_torch: Any = torch

MakeTrainer = Callable[[Path, Callback], pl.Trainer]
"""Makes a trainer that writes below a folder and has the given callback besides its own."""


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The same batch over and over, already made: `(x, y)`, `(64, *shape)` and `(64,)`, ten classes."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = (
            torch.rand((BATCH_SIZE, *shape), generator=generator),
            torch.randint(10, (BATCH_SIZE,), generator=generator),
        )
        self.count = count

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batch

    def __len__(self) -> int:
        return self.count


def loader(shape: tuple[int, ...], count: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """A data loader with hardly any work: *count* batches of inputs of this shape."""
    return DataLoader(Batches(shape, count), batch_size=None)


class DeepModel(pl.LightningModule):
    """Many small tensors: 40 times (Linear 128, LayerNorm, ReLU), 164 tensors in all; inputs of 32."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU()) for _ in range(40)
        ]
        self.net = nn.Sequential(nn.Linear(32, 128), *blocks, nn.Linear(128, 10))

    @property
    def shared_parameters(self) -> list[tuple[nn.Parameter, float]]:
        """As if the first and the last layer were used twice."""
        return [(p, 2.0) for layer in (self.net[0], self.net[-1]) for p in layer.parameters()]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scores = self.net(batch[0])
        self.log("val_loss", functional.cross_entropy(scores, batch[1]))
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A fused one is skipped on the device, with no wait; on the CPU torch's default is compared.
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.device.type == "cuda")


class Stamps(Callback):
    """Notes the clocks when training starts its first batch and when each batch has ended."""

    def __init__(self) -> None:
        self.first: Sample | None = None
        self.ends: list[Sample] = []

    @override
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self.first is None:
            self.first = _now()

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(_now())


def _now() -> Sample:
    return Sample(time.perf_counter(), time.process_time())


def _plain_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning alone, with a CSV logger and no checkpoints."""
    return _lightning(folder, [stamps])


def _empty_callbacks_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning with as many callbacks as the demo has, none of which does anything."""
    return _lightning(folder, [*(Callback() for _ in range(_num_demo_callbacks())), stamps])


def _lightning_average_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning with its own average of the weights."""
    return _lightning(folder, [EMAWeightAveraging(decay=_DECAY), stamps])


def _dynamics_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning with our average, gradient skipping at work in each step, and shared parameters."""
    from nshtrainer_ema import EMACallback, GradientSkippingCallback, SharedParametersCallback

    skipping = GradientSkippingCallback(threshold=1e9, start_after_n_steps=0)
    ours = [EMACallback(decay=_DECAY), skipping, SharedParametersCallback()]
    return _lightning(folder, [*ours, stamps])


class _Kernels(Callback):
    """One norm of all gradients and one average of all weights, as bare calls into torch."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = list(pl_module.parameters())
        self.averages = [weight.detach().clone() for weight in self.weights]

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        norms = _torch._foreach_norm([weight.grad for weight in self.weights])
        torch.linalg.vector_norm(torch.stack(norms))

    @override
    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        _torch._foreach_lerp_(self.averages, self.weights, 1 - _DECAY)


def _kernels_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning and the calls without which there is neither a norm nor an average."""
    return _lightning(folder, [_Kernels(), stamps])


def _every_callback_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Ours with every callback of every family; what talks to wandb is no part of it."""
    return _every_callback(folder, stamps, log_every=_LOG_EVERY)


def _every_step_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """The same, logging at every step."""
    return _every_callback(folder, stamps, log_every=1)


def _lightning_every_step_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning alone, logging at every step."""
    return _lightning(folder, [stamps], log_every_n_steps=1)


def _act_save_off_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning with `act_save` switched off."""
    from nshtrainer_wandb import ActSaveCallback

    return _lightning(folder, [ActSaveCallback(enabled=False, include=["*"]), stamps])


def _act_save_between_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Lightning with `act_save` of every submodule, at the steps between those that it stores."""
    from nshtrainer_wandb import ActSaveCallback

    rarely = ActSaveCallback(save_dir=folder / "a", include=["net.*"], every_n_steps=10**6)
    return _lightning(folder, [rarely, stamps])


def _every_callback(folder: Path, stamps: Callback, *, log_every: int) -> pl.Trainer:
    per_parameter = dict.fromkeys(("log_grad_norm_per_param", "log_param_norm_per_param"), True)
    plain = every_family()
    plain["log_norms"] |= per_parameter
    plain["loggers"] = [{"name": "csv"}]
    plain["directory"] = {"project_root": folder}
    plain |= {**_SETTINGS, "log_every_n_steps": log_every}
    for callback in plain["callbacks"]:
        if callback["name"] == "gradient_skipping":
            callback |= {"threshold": 1e9, "start_after_n_steps": 0}
    return Trainer(TrainerConfig.model_validate(plain), callbacks=[stamps])


def _lightning(folder: Path, callbacks: list[Callback], **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        callbacks=callbacks,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        default_root_dir=folder,
        **{**_SETTINGS, **settings},
    )


def _core_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Ours with what the core alone gives: a CSV logger and the run's record."""
    config = TrainerConfig.model_validate(
        {**dict.fromkeys(SLOTS), **_SETTINGS, "directory": {"project_root": folder}}
    )
    return Trainer(config, callbacks=[stamps])


def _wandb_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """The same with W&B's logger, offline, and its watch as it is by default."""
    os.environ["WANDB_SILENT"] = "true"
    loggers = [{"name": "csv"}, {"name": "wandb", "offline": True, "log_code": None}]
    config = TrainerConfig.model_validate(
        {
            **dict.fromkeys(SLOTS),
            **_SETTINGS,
            "directory": {"project_root": folder},
            "loggers": loggers,
        }
    )
    return _just_before_a_record(Trainer(config, callbacks=[stamps]))


def _without_wandb_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """What it is compared with."""
    return _just_before_a_record(_core_trainer(folder, stamps))


def _just_before_a_record(trainer: pl.Trainer) -> pl.Trainer:
    """Count as if most of 1000 steps had been made, so that a record, one in 1000 steps, comes soon."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = WATCH_EVERY - STEPS_TO_RECORD
    return trainer


def _demo_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """Ours with all of the demo's callbacks and a CSV logger; wandb is no part of it."""
    return Trainer(_demo_config(folder), callbacks=[stamps])


def _trying_trainer(folder: Path, stamps: Callback) -> pl.Trainer:
    """The same, with a save on trial before the first batch."""
    return Trainer(_demo_config(folder, trial=True), callbacks=[stamps])


_SETTINGS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": _LOG_EVERY,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextlib.contextmanager
def on_gpu() -> Generator[None]:
    """Train on the GPU inside the block."""
    accelerator = _SETTINGS["accelerator"]
    _SETTINGS["accelerator"] = "cuda"
    try:
        yield
    finally:
        _SETTINGS["accelerator"] = accelerator


def _demo_config(folder: Path, *, trial: bool = False) -> TrainerConfig:
    config, missing = demo_config(folder)
    if missing:
        raise RuntimeError(f"the demo needs every family; missing: {', '.join(missing)}")
    always: dict[str, Any] = {"threshold": 1e9, "start_after_n_steps": 0}
    callbacks = [  # every step is looked at, none is skipped: that would be a cheaper one
        c.replace(**always) if c.identity == "gradient_skipping" else c for c in config.callbacks
    ]
    loggers = [c for c in config.loggers if getattr(c, "name", "") == "csv"]
    config = config.replace(callbacks=callbacks, loggers=loggers, **_SETTINGS)
    saving: Any = config.checkpoint_saving
    return config.replace(checkpoint_saving=saving.replace(trial=trial))


@functools.cache
def _num_demo_callbacks() -> int:
    """How many Lightning callbacks the demo's trainer has, without those that Lightning adds.

    Counted once, in a warm-up, so that no sample includes it.
    """
    from nshtrainer import resolve_callbacks

    return len(resolve_callbacks(_demo_config(Path())))


@contextlib.contextmanager
def quiet() -> Generator[Path]:
    """A folder for one run, and silence: tables, advice about speed and remarks are not our subject."""
    level = logging.root.manager.disable
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield Path(folder)
        finally:
            logging.disable(level)


NETS: dict[str, tuple[Callable[[], pl.LightningModule], tuple[int, ...]]] = {
    "the demo's CNN": (DigitsModel, (1, 8, 8)),
    "deep net, 164 tensors": (DeepModel, (32,)),
}
"""What is trained -> how it is made, and the shape of its inputs."""

TRAINERS: dict[str, MakeTrainer] = {
    "Lightning": _plain_trainer,
    "Lightning, as many empty callbacks": _empty_callbacks_trainer,
    "nshtrainer, core defaults": _core_trainer,
    "nshtrainer, the demo's callbacks": _demo_trainer,
}
"""Who trains; the first is what the others are divided by."""

STARTS: dict[str, MakeTrainer] = {
    **TRAINERS,
    "the same, with a save on trial": _trying_trainer,
}
"""Those whose way to the first batch is compared."""

DYNAMICS = "Lightning, our EMA, gradient skipping and shared parameters"
EVERYTHING = "nshtrainer, every callback"
EVERY_STEP = "nshtrainer, every callback, logging at every step"
WANDB = "nshtrainer, W&B logger and watch"
WITH_WANDB: dict[str, MakeTrainer] = {
    "nshtrainer, the same without": _without_wandb_trainer,
    WANDB: _wandb_trainer,
}
"""With and without W&B; the first is what the other is divided by."""

STEPS: dict[str, MakeTrainer] = {
    "Lightning": _plain_trainer,
    "Lightning, one foreach norm and one foreach average": _kernels_trainer,
    "Lightning, its EMAWeightAveraging": _lightning_average_trainer,
    "Lightning, act_save off": _act_save_off_trainer,
    "Lightning, act_save between stored steps": _act_save_between_trainer,
    DYNAMICS: _dynamics_trainer,
    EVERYTHING: _every_callback_trainer,
    "Lightning, logging at every step": _lightning_every_step_trainer,
    EVERY_STEP: _every_step_trainer,
}
"""Those whose steps are compared on the deep net; the demo's shares no parameters."""
