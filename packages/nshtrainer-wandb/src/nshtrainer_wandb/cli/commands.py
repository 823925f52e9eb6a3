"""`nshtrainer wandb code`: which files a run would upload; neither torch nor wandb is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from nshtrainer.cli.output import plugins_print_to_stderr
from nshtrainer.errors import ConfigError
from nshtrainer.trainer.config import TrainerConfig
from nshtrainer_wandb.logger.config import WandbLoggerConfig
from nshtrainer_wandb.upload_code.collect import Selection, select
from nshtrainer_wandb.upload_code.config import WandbUploadCodeCallbackConfig

__all__ = ["wandb"]


@click.group()
def wandb() -> None:
    """See what a run would send to Weights & Biases."""


@wandb.command("code")
@click.argument(
    "path", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A run's YAML, JSON or TOML file, whose patterns and sizes are used.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def code_command(path: Path | None, config_file: Path | None, as_json: bool) -> None:
    """List the source files that a run would upload, and what it leaves out and why.

    Nothing is sent. PATH is the folder to look at; without it, the one of the configuration, or the root
    of the git repository around the current folder.
    """
    with plugins_print_to_stderr():
        config = WandbUploadCodeCallbackConfig() if config_file is None else _read(config_file)
    root, selection = select(config, path)
    if as_json:
        click.echo(json.dumps(_report(root, selection), indent=2))
    else:
        click.echo("\n".join(_listing(root, selection)))


def _read(file: Path) -> WandbUploadCodeCallbackConfig:
    """Return the upload that the run described by *file* makes.

    Raises:
        ConfigError: It makes none.
    """
    run = TrainerConfig.from_file(file)
    loggers = [x for x in run.loggers if isinstance(x, WandbLoggerConfig) and x.enabled]
    wanted = [*run.callbacks, *(x.log_code for x in loggers)]
    for config in wanted:
        if isinstance(config, WandbUploadCodeCallbackConfig) and config.enabled and loggers:
            return config
    missing = "its logger `wandb` has `log_code: null`" if loggers else "it has no logger `wandb`"
    raise ConfigError(f"{file}: the run uploads no code: {missing}; add it, or leave out --config")


def _report(root: Path, selection: Selection) -> dict[str, Any]:
    return {
        "root": str(root),
        "size_bytes": sum(selection.files.values()),
        "files": [{"path": path, "size_bytes": size} for path, size in selection.files.items()],
        "left_out": [
            {"path": path, "reason": reason, "is_secret": path in selection.secrets}
            for path, reason in selection.left_out.items()
        ],
    }


def _listing(root: Path, selection: Selection) -> Iterator[str]:
    width = max((len(str(size)) for size in selection.files.values()), default=0)
    width = max(width, len("bytes"))
    if selection.files:
        yield f"{'bytes':>{width}}  file"
    for path, size in selection.files.items():
        yield f"{size:>{width}}  {path}"
    if selection.left_out:
        yield ""
        yield "left out"
    # Secrets stand last, where they are seen.
    for path, reason in sorted(selection.left_out.items(), key=lambda x: x[0] in selection.secrets):
        yield f"  {'!' if path in selection.secrets else ' '} {path}: {reason}"
    yield ""
    total = sum(selection.files.values()) / 1000
    yield (
        f"{len(selection.files)} files, {total:.1f} kB, from {root}; {len(selection.left_out)} left out"
        + (f", {len(selection.secrets)} of them as secrets (!)" if selection.secrets else "")
    )
