"""The demo's training, and what is said about it afterwards."""

from __future__ import annotations

import logging
import math
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
from lightning.pytorch.callbacks import ModelCheckpoint

from nshtrainer.directory import DirectoryConfig
from nshtrainer.errors import ConfigError
from nshtrainer.trainer.config import TrainerConfig
from nshtrainer.trainer.trainer import Trainer

from .config import PROJECT
from .digits import DigitsData, DigitsModel

__all__ = ["train"]

_ACCURACY = "val_acc"


def train(config: TrainerConfig) -> None:
    """Train as *config* says, measure the best checkpoint again, and print what there is to know.

    Raises:
        ConfigError: There is nothing to go on from, or nothing to train.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        # 1,437 images in memory: worker processes would only slow this down.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning, on a recent torch
        trainer, model, data = Trainer(config), DigitsModel(), DigitsData()
        if config.ckpt_path == "last":
            _check_last(trainer)
        trainer.fit(model, datamodule=data)
        if model.num_batches == 0:
            raise ConfigError(_why_nothing(trainer))
        accuracy = _accuracy(trainer)
        best = [*_best(trainer, model, data)]
    for line in ("", accuracy, *best, *_places(trainer.config), *_commands(trainer)):
        click.echo(line)


def _check_last(trainer: Trainer) -> None:
    """Where there is no checkpoint, Lightning warns and starts from scratch.

    Raises:
        ConfigError: There is none.
    """
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if not any(c._find_last_checkpoints(trainer) for c in savers):  # pyright: ignore[reportPrivateUsage] -- what Lightning itself asks, once `fit` has begun
        raise ConfigError(
            f"there is no checkpoint to go on from in {trainer.config.run.directory.root}"
            f"{'' if savers else ', and no callback that could save one'}; "
            f"start a new run with `nshtrainer demo`"
        )


def _why_nothing(trainer: Trainer) -> str:
    config = trainer.config
    if config.ckpt_path is not None:
        epochs = trainer.current_epoch
        return (
            f"nothing was trained: the run has its {epochs} epochs already; go on with "
            f"`nshtrainer demo --resume --epochs {epochs + 5}{_where(config)}`"
        )
    limits = ("max_epochs", "max_steps", "max_time", "limit_train_batches", "overfit_batches")
    given = [f"{name}: {value}" for name in limits if (value := getattr(config, name)) is not None]
    return (
        f"nothing was trained: the configuration leaves no batch to train on ({', '.join(given)}); "
        f"allow one"
    )


def _accuracy(trainer: Trainer) -> str:
    """One line on how good the network is after the last epoch."""
    config = trainer.config
    if (score := trainer.callback_metrics.get(_ACCURACY)) is not None:
        images = "" if config.limit_val_batches or config.fast_dev_run else f"{len(_held_out())} "
        return f"accuracy on {images}held-out images: {float(score):.2%} after the last epoch"
    if config.barebones:
        return "accuracy: not known, since `barebones` logs nothing"
    if config.limit_val_batches == 0:
        return "accuracy: not known, since `limit_val_batches: 0` switches validation off"
    return "accuracy: not known, since no validation was due"


def _best(trainer: Trainer, model: DigitsModel, data: DigitsData) -> Iterator[str]:
    """One line on the best checkpoint, measured again; none where nothing saves checkpoints."""
    saver = trainer.checkpoint_callback
    if not isinstance(saver, ModelCheckpoint) or trainer.config.fast_dev_run:
        return
    name, score = saver.monitor, saver.best_model_score
    path = str(saver.best_model_path)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] -- Lightning does not say
    if name is None:
        yield "best checkpoint: there is none, since the configuration has no `primary_metric`"
    elif not path or score is None or math.isnan(score):
        yield f"best checkpoint: there is none, since {name!r} was not logged"
    else:
        measured = trainer.validate(model, datamodule=data, ckpt_path=path, verbose=False)
        again = measured[0].get(name) if measured else None
        yield f"best checkpoint: {_compared(name, float(score), again)}"


def _compared(name: str, recorded: float, again: float | None) -> str:
    """The score of a checkpoint when it was saved, and after it was read back."""
    if again is None:
        return f"{_shown(name, recorded)}; validation does not measure {name!r} again"
    same = "the same, exactly" if recorded == again else "NOT THE SAME"
    return f"{_shown(name, recorded)}; reloaded and measured again: {_shown(name, again)} ({same})"


def _shown(name: str, value: float) -> str:
    return f"{value:.2%}" if name == _ACCURACY else f"{name} {value:.6g}"


def _held_out() -> range:
    return range(0, 1797, 5)


def _places(config: TrainerConfig) -> Iterator[str]:
    """Where everything lies."""
    root = config.run.directory.root
    if not root.is_dir():
        yield f"run {config.run.id}: it wrote nothing"
        return
    yield f"run {config.run.id}: {root}"
    for label, path in _files(root):
        yield f"  {label:<12}{path.relative_to(root)}"


def _files(root: Path) -> list[tuple[str, Path]]:
    found = [
        ("metrics", next(root.glob("log/csv/**/metrics.csv"), None)),
        ("best", next(root.glob("checkpoint/best_*.ckpt"), None)),
        ("last", next(root.glob("checkpoint/last.ckpt"), None)),
        ("wandb", next(root.glob("log/wandb"), None)),
        ("config", next(root.glob("config.yaml"), None)),
        ("record", next(root.glob("run.json"), None)),
    ]
    return [(label, path) for label, path in found if path is not None]


def _commands(trainer: Trainer) -> Iterator[str]:
    """How to go on, as far as there is something to go on from."""
    config = trainer.config
    root = config.run.directory.root
    is_found = config.directory.logdir_basename == DirectoryConfig().logdir_basename
    if config.project == PROJECT and is_found and (root / "checkpoint" / "last.ckpt").exists():
        epochs = trainer.current_epoch + 5
        yield f"train on:      nshtrainer demo --resume --epochs {epochs}{_where(config)}"
    if (root / "config.yaml").is_file():
        yield f"the same run:  nshtrainer demo --config {shlex.quote(str(root / 'config.yaml'))}"


def _where(config: TrainerConfig) -> str:
    """The option that names the run's place, if it is not the current folder."""
    root = config.directory.project_root
    return "" if root is None else f" --dir {shlex.quote(str(root))}"
