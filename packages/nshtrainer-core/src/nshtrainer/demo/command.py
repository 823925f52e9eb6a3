"""`nshtrainer demo`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from nshtrainer.cli.output import OutputError
from nshtrainer.directory import DirectoryConfig
from nshtrainer.errors import ConfigError, NshTrainerError
from nshtrainer.run.run import check_root, project_root
from nshtrainer.trainer.config import TrainerConfig

from .config import PROJECT, demo_config

__all__ = ["demo"]


@click.command()
@click.option(
    "--dir",
    "root",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where nshtrainer_logs is made, or with --resume looked for; the current folder by default.",
)
@click.option(
    "--epochs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Train until there are N epochs in all, those before --resume included; 15 by default.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the newest run of the demo, from its last checkpoint.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Make a new run with this YAML, JSON or TOML file; not with --resume.",
)
@click.option(
    "--write-config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the configuration to a file, and train nothing; not with --resume.",
)
def demo(
    config_file: Path | None,
    write_config: Path | None,
    resume: bool,
    epochs: int | None,
    root: Path | None,
) -> None:
    """Train a small CNN on handwritten digits: a real run, under a minute on two cores.

    It uses every callback and logger that is installed here and fits, and says at the end how good the
    network is, where everything lies, and how to go on.
    """
    if resume:
        _refuse_with_resume({"--config": config_file, "--write-config": write_config})
    root = None if root is None else root.resolve()
    config, missing = _configuration(config_file, root, resume=resume)
    if epochs is not None:
        config.max_epochs = epochs
    if write_config is not None:
        click.echo(f"wrote {config.to_file(write_config)}", err=True)
        return
    for name, reason in missing.items():
        click.echo(f"left out: {name}: {reason}")
    _check_place(config.directory)

    from .training import train

    train(config)


def _refuse_with_resume(options: dict[str, Path | None]) -> None:
    for option, value in options.items():
        if value is not None:
            raise click.UsageError(
                f"--resume goes on with the configuration that the run has recorded, so {option} does "
                f"not go with it; leave one of them out"
            )


def _configuration(
    file: Path | None, root: Path | None, *, resume: bool
) -> tuple[TrainerConfig, dict[str, str]]:
    """What to train, and what had to be left out: callback or logger -> the reason."""
    if resume:
        return newest_run(root), {}
    if file is None:
        return demo_config(root)
    config = TrainerConfig.from_file(file).reset_run()
    if root is not None:
        config.directory = config.directory.replace(project_root=root)
    return config, {}


def newest_run(root: Path | None) -> TrainerConfig:
    """The recorded configuration of the newest run of the demo, set to go on where it lies now.

    Args:
        root: The folder with `nshtrainer_logs`; None is the current one.

    Raises:
        ConfigError: There is none.
    """
    here = DirectoryConfig(project_root=root)
    records = (project_root(here) / here.logdir_basename).glob("*/config.yaml")
    for path in sorted(records, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            config = TrainerConfig.from_file(path)
        except NshTrainerError:
            continue  # another program's run; what it needs may not be installed here
        if config.project == PROJECT:
            return config.replace(ckpt_path="last", directory=here, id=path.parent.name)
    raise ConfigError(
        f"there is no run of the demo in {project_root(here)}; start one with `nshtrainer demo`, or "
        f"name the folder of an earlier one with --dir"
    )


def _check_place(directory: DirectoryConfig) -> None:
    """Find out before torch is imported that the run could not write; nothing is left behind.

    Raises:
        ConfigError: A file is in the way.
        OutputError: The folder, or the one that it would be made in, takes no files.
    """
    check_root(directory)
    folder = project_root(directory).absolute() / directory.logdir_basename
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(
            f"the run would write to {folder}, but {there} takes no files: "
            f"{error.strerror or error}; name another folder with --dir"
        ) from error
