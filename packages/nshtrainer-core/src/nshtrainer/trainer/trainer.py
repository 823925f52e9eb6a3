"""`Trainer`: a Lightning trainer that is made from a `TrainerConfig`."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import reprlib
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from pydantic import ValidationError
from typing_extensions import override

from nshtrainer.callbacks.assembly import resolve_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer.factory_guard import without_factories
from nshtrainer.loggers.base import LoggerConfigBase
from nshtrainer.plugins.policy import using_policy
from nshtrainer.run.run import check_root, project_root
from nshtrainer.runtime import saving

from .config import TrainerConfig
from .lightning_arguments import NOT_IN_CONFIG, LightningArguments, lightning_kwargs
from .record import RunRecord

__all__ = ["Trainer"]

log = logging.getLogger(__name__)


class Trainer(pl.Trainer):
    """`lightning.pytorch.Trainer`, made from a configuration.

    Args:
        config: The run, or a mapping that describes it. A validated deep copy is kept as
            `trainer.config`; later changes of *config* do not reach this trainer.
        objects: Arguments of Lightning's Trainer that no file can say: `strategy`, `accelerator`,
            `profiler` or `plugins` as objects, `callbacks` and `logger` beside the configured ones.
            None is the same as leaving it out.

    Raises:
        pydantic.ValidationError: Something in *config* does not fit.
        ConfigError: Two callbacks or loggers cannot stand side by side, a `PL_TRAINER_*` variable does
            not fit, or the run cannot have a folder where it should.
        TypeError: A keyword is no argument of Lightning's Trainer, or belongs in the config.
    """

    def __init__(
        self, config: TrainerConfig | Mapping[str, Any] | None = None, **objects: Any
    ) -> None:
        validated = _validated(config)
        objects = _checked_objects(validated, objects)
        self.config = _with_environment(validated, objects.keys())
        check_root(self.config.directory)
        self.debug = self.config.debug
        self._ckpt_path_from_config = self.config.ckpt_path
        extra = _as_list(objects.pop("callbacks", None), Callback)
        given = _as_list(objects.pop("logger", None), Logger)
        with using_policy(self.config.plugins):
            callbacks = resolve_callbacks(self.config, extra, copy=False)
            loggers = [*_make_loggers(self.config, given), *given]
        kwargs = {**lightning_kwargs(self.config), **objects}
        _settle_checkpointing(self.config, kwargs, callbacks)
        if not self.config.barebones:  # Lightning refuses a logger in barebones mode
            kwargs["logger"] = loggers or False
        record = RunRecord(self.config, {**objects, "logger": given} if given else objects)
        kwargs["callbacks"] = [*callbacks, record]
        _set_torch(self.config)
        with without_factories():
            super().__init__(**kwargs)

    @property
    @override
    def default_root_dir(self) -> str:
        """The run's directory; it is made at the first write."""
        known = self.config.run.known_directory
        if known is None and not self.is_global_zero:
            return os.fspath(project_root(self.config.directory))
        return os.fspath(self.config.run.directory.root)

    @property
    @override
    def log_dir(self) -> str | None:
        """The first logger's folder; a collective, which Lightning itself calls before `setup`."""
        self.config.run.settle(self)
        return super().log_dir

    @override
    def fit(self, *args: Any, ckpt_path: str | Path | None = None, **kwargs: Any) -> None:
        """Train; see `lightning.pytorch.Trainer.fit`.

        The config's `ckpt_path` counts for the first call only, and if none is given here. `"auto"`
        is the newest committed checkpoint of this run, or a start from scratch without one; like
        `"last"` it needs a checkpoint family, and finds only what has the same run id.

        Raises:
            ConfigError: `"auto"` without a checkpoint callback that can find one.
        """
        if ckpt_path is None and len(args) < _CKPT_PATH_POSITION:
            ckpt_path, self._ckpt_path_from_config = self._ckpt_path_from_config, None
        if ckpt_path == AUTO and not self._finds_newest():
            ckpt_path = None
        if self.is_global_zero:
            _ = self.config.run.id  # made before processes are spawned from this one
        if ckpt_path is not None:
            kwargs["ckpt_path"] = ckpt_path
        super().fit(*args, **kwargs)

    def _finds_newest(self) -> bool:
        """Whether a callback will find what `"auto"` stands for; False in a run that saves nothing."""
        if self.config.fast_dev_run:
            return False
        if not any(getattr(c, FINDS_NEWEST, False) for c in self.checkpoint_callbacks):
            raise ConfigError(
                "ckpt_path='auto' resumes the newest checkpoint of this run, but no callback here "
                "saves any that it could find; set `checkpoint_saving` (nshtrainer-checkpoint), or "
                "leave ckpt_path out"
            )
        if self.is_global_zero and self.config.run.known_id is None:
            log.warning(
                "ckpt_path='auto' finds nothing, since this run gets a new id; set `id` in the "
                "config or NSHTRAINER_RUN_ID, so that a later start is the same run"
            )
        return True

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; see `lightning.pytorch.Trainer.save_checkpoint`.

        One that is saved after `fit` is prepared by the callbacks like those that were saved in it.
        """
        was_installed = saving.is_installed(self)
        saving.install(self)
        try:
            super().save_checkpoint(*args, **kwargs)
        finally:
            if not was_installed:
                saving.uninstall(self)

    @classmethod
    def config_from_checkpoint(cls, path: str | Path) -> TrainerConfig:
        """The configuration of the run that wrote the checkpoint at *path*.

        Raises:
            ConfigError: The checkpoint holds none.
            pydantic.ValidationError: It does not fit what is installed now.
        """
        import torch

        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = checkpoint.get(RunRecord.CONFIG_KEY)
        if config is None:
            raise ConfigError(
                f"{path} holds no trainer configuration; it was not written by nshtrainer.Trainer"
            )
        return TrainerConfig.model_validate(config)


AUTO: Final = "auto"
"""As `ckpt_path` of `fit`: the newest committed checkpoint of this run, or none."""

FINDS_NEWEST: Final = "finds_newest_checkpoint"
"""Attribute of a checkpoint callback, true if it makes `"auto"` a path before Lightning reads it."""

_CKPT_PATH_POSITION = 5  # of fit's positional arguments, the model being the first


def _validated(config: TrainerConfig | Mapping[str, Any] | None) -> TrainerConfig:
    if isinstance(config, TrainerConfig):
        return config.revalidated()
    if config is not None and not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] -- users are not type-checked
        raise TypeError(
            f"a TrainerConfig or a mapping is expected, not {type(config).__name__}; "
            f"Lightning's own arguments are fields of TrainerConfig"
        )
    return TrainerConfig.model_validate({} if config is None else config)


def _with_environment(config: TrainerConfig, keywords: Collection[str]) -> TrainerConfig:
    """*config* with what Lightning's `PL_TRAINER_*` variables say about arguments that are left open.

    Lightning would read them for the arguments in our own signature, which has none of them. As
    with Lightning an empty variable is none, and a keyword wins.

    Raises:
        ConfigError: A variable's value does not fit.
    """
    found: dict[str, Any] = {}
    for name in LightningArguments.model_fields:
        text = os.environ.get(_variable(name))
        if text and getattr(config, name) is None and name not in keywords:
            with contextlib.suppress(Exception):  # as Lightning: what is no literal is text
                text = ast.literal_eval(text)
            found[name] = text
    for name, instead in NOT_IN_CONFIG.items():
        if os.environ.get(_variable(name)):
            warnings.warn(
                f"{_variable(name)} has no effect on nshtrainer.Trainer: {name!r} is {instead}",
                stacklevel=3,
            )
    try:
        return config.replace(**found) if found else config
    except ValidationError as error:
        raise ConfigError(_misfit(error, found)) from error


def _misfit(error: ValidationError, found: Iterable[str]) -> str:
    problems = error.errors()
    fields = {str(problem["loc"][0]) for problem in problems if problem["loc"]}
    variables = [_variable(name) for name in found if name in fields or not fields]
    values = ", ".join(f"{v}={reprlib.repr(os.environ[v])}" for v in variables)
    reasons = "; ".join(dict.fromkeys(problem["msg"] for problem in problems))
    return f"the environment has {values}, which does not fit: {reasons}; change or unset it"


def _variable(argument: str) -> str:
    return f"PL_TRAINER_{argument.upper()}"


def _checked_objects(config: TrainerConfig, objects: dict[str, Any]) -> dict[str, Any]:
    """The keywords that say something.

    Raises:
        TypeError: One is no argument of Lightning's, belongs in the config, or stands there too.
    """
    for name, value in objects.items():
        is_field = name in LightningArguments.model_fields
        if not is_field and name not in NOT_IN_CONFIG:
            raise TypeError(f"{name!r} is no argument of lightning.pytorch.Trainer")
        if value is None:
            continue
        if name == "default_root_dir":
            raise TypeError(f"'default_root_dir' is {NOT_IN_CONFIG[name]}")
        if is_field and isinstance(value, (bool, int, float, str)):
            raise TypeError(
                f"{name}={value!r} belongs in the config: TrainerConfig({name}={value!r}), or "
                f"Trainer(config.replace({name}={value!r})); keywords are for objects"
            )
        if is_field and getattr(config, name) is not None:
            raise TypeError(f"{name!r} is given twice: in the config and as a keyword; remove one")
    return {name: value for name, value in objects.items() if value is not None}


def _as_list(value: Any, kind: type[Any]) -> list[Any]:
    if value is None or value is False:
        return []
    is_many = isinstance(value, Iterable) and not isinstance(value, kind)
    items: list[Any] = [*value] if is_many else [value]
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"a {kind.__name__} is expected, not {item!r}")
    return items


def _make_loggers(config: TrainerConfig, given: list[Logger]) -> list[Logger]:
    """The configured loggers; *given* are those that join them.

    Raises:
        ConfigError: There is a logger in barebones mode, or two would write the same files.
    """
    if config.barebones:
        if given:
            raise ConfigError(
                f"Trainer(logger={type(given[0]).__name__}(...)) does not go with barebones=True, which "
                "logs nothing; leave one of them out"
            )
        return []
    enabled = sorted((c for c in config.loggers if c.enabled), key=lambda c: -c.priority)
    _check_folders(config.loggers)
    return [logger for c in enabled if (logger := c.create_logger(config)) is not None]


def _check_folders(loggers: list[LoggerConfigBase]) -> None:
    seen: dict[tuple[type, Path | None], int] = {}
    for index, logger in enumerate(loggers):
        if not logger.enabled or not logger.one_per_folder:
            continue
        folder = None if logger.log_dir is None else logger.log_dir.expanduser().absolute()
        first = seen.setdefault((type(logger), folder), index)
        if first != index:
            name = getattr(logger, "name", type(logger).__name__)
            raise ConfigError(
                f"loggers[{first}] and loggers[{index}] are both {name!r} and would write the same "
                "files; remove one, or give it a `log_dir` of its own"
            )


def _settle_checkpointing(
    config: TrainerConfig, kwargs: dict[str, Any], callbacks: list[Callback]
) -> None:
    """Without a checkpoint callback of ours, Lightning would add its own behind our back.

    Raises:
        ConfigError: There is a checkpoint callback in barebones mode.
    """
    saves = [c for c in callbacks if isinstance(c, Checkpoint)]
    if config.enable_checkpointing is False:
        for callback in saves:
            callbacks.remove(callback)
    elif saves and config.barebones:
        names = ", ".join(sorted({type(c).__name__ for c in saves}))
        raise ConfigError(
            f"barebones mode saves no checkpoints, but {names} has enabled_for_barebones=true; take "
            "that out of its `metadata`, or leave `barebones` out"
        )
    elif not saves and config.enable_checkpointing is None and not config.barebones:
        kwargs["enable_checkpointing"] = False


def _set_torch(config: TrainerConfig) -> None:
    if config.set_float32_matmul_precision is not None:
        import torch

        torch.set_float32_matmul_precision(config.set_float32_matmul_precision)
    if config.seed is not None:
        pl.seed_everything(config.seed, workers=config.seed_workers, verbose=False)
