"""`nshtrainer demo`."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.trainer.config import TrainerConfig

from .config import demo_config

if TYPE_CHECKING:
    from nshtrainer.trainer.trainer import Trainer

__all__ = ["demo"]


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Make a new run with this YAML, JSON or TOML file.",
)
@click.option(
    "--write-config",
    type=click.Path(path_type=Path),
    help="Write the demo's configuration to a file, and stop.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the newest run of the demo in this folder."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Train until this epoch.")
@click.option(
    "--dir",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to make nshtrainer_logs; the current folder by default.",
)
def demo(
    config_file: Path | None,
    write_config: Path | None,
    resume: bool,
    epochs: int | None,
    root: Path | None,
) -> None:
    """Train a small CNN on handwritten digits: a real run, under a minute on two cores."""
    root = None if root is None else root.absolute()
    missing: dict[str, str] = {}
    if resume:
        config = _newest_run(root or Path.cwd())
    elif config_file is not None:
        config = TrainerConfig.from_file(config_file).reset_run()
    else:
        config, missing = demo_config(root)
    if epochs is not None:
        config.max_epochs = epochs
    if write_config is not None:
        click.echo(f"wrote {config.to_file(write_config)}")
        return
    _say_missing(missing)
    _train(config)


def _say_missing(missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        click.echo(f"left out: {name}: {reason}")


def _newest_run(root: Path) -> TrainerConfig:
    """The recorded configuration of the newest run of the demo, set to go on from its last checkpoint.

    Raises:
        ConfigError: There is none.
    """
    records = (root / "nshtrainer_logs").glob("*/config.yaml")
    for path in sorted(records, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            config = TrainerConfig.from_file(path)
        except NshTrainerError:
            continue  # another program's run; what it needs may not be installed here
        if config.project == "nshtrainer-demo":
            return config.replace(ckpt_path="last")
    raise ConfigError(f"there is no run of the demo in {root}; start one with `nshtrainer demo`")


def _train(config: TrainerConfig) -> None:
    from nshtrainer.trainer.trainer import Trainer

    from .digits import DigitsData, DigitsModel

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        # 1,437 images in memory: worker processes would only slow this down.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning, on a recent torch
        trainer, model, data = Trainer(config), DigitsModel(), DigitsData()
        trainer.fit(model, datamodule=data)
        if "val_acc" not in trainer.callback_metrics:
            raise ConfigError(
                f"nothing was trained: the run has its {trainer.current_epoch} epochs already; "
                f"go on with `nshtrainer demo --resume --epochs {trainer.current_epoch + 5}`"
            )
        score = float(trainer.callback_metrics["val_acc"])
        again = _validate_best(trainer, model, data)
    _report(trainer, score, again)


def _validate_best(trainer: Trainer, model: Any, data: Any) -> tuple[float, float] | None:
    """The recorded score of the best checkpoint, and the one that it has after reloading."""
    best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best:
        return None
    recorded = float(getattr(trainer.checkpoint_callback, "best_model_score", None) or "nan")
    (metrics,) = trainer.validate(model, datamodule=data, ckpt_path=best, verbose=False)
    return recorded, float(metrics["val_acc"])


def _report(trainer: Trainer, score: float, again: tuple[float, float] | None) -> None:
    directory = trainer.config.run.directory
    click.echo(
        f"\naccuracy on {len(_held_out())} held-out images: {score:.2%} after the last epoch"
    )
    if again is not None:
        recorded, reloaded = again
        same = "the same, exactly" if recorded == reloaded else "NOT THE SAME"
        click.echo(
            f"best checkpoint: {recorded:.2%}; reloaded and measured again: {reloaded:.2%} ({same})"
        )
    click.echo(f"run {trainer.config.run.id}: {directory.root}")
    for label, path in _places(directory.root):
        click.echo(f"  {label:<12}{path.relative_to(directory.root)}")
    root = trainer.config.directory.project_root
    where = "" if root is None else f" --dir {root}"
    if again is not None:
        epochs = trainer.current_epoch + 5
        click.echo(f"train on:      nshtrainer demo --resume --epochs {epochs}{where}")
    click.echo(f"the same run:  nshtrainer demo --config {directory.root / 'config.yaml'}")


def _held_out() -> range:
    return range(0, 1797, 5)


def _places(root: Path) -> list[tuple[str, Path]]:
    found = [
        ("metrics", next(root.glob("log/csv/**/metrics.csv"), None)),
        ("best", next(root.glob("checkpoint/best_*.ckpt"), None)),
        ("last", next(root.glob("checkpoint/last.ckpt"), None)),
        ("wandb", next(root.glob("log/wandb"), None)),
        ("config", next(root.glob("config.yaml"), None)),
        ("record", next(root.glob("run.json"), None)),
    ]
    return [(label, path) for label, path in found if path is not None]
