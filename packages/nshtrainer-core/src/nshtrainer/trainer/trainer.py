"""`Trainer`: a Lightning trainer that is made from a `TrainerConfig`."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from nshtrainer.callbacks.assembly import resolve_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer.factory_guard import without_factories
from nshtrainer.plugins.policy import using_policy
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

    Raises:
        pydantic.ValidationError: Something in *config* does not fit.
        ConfigError: Two callbacks cannot stand side by side.
        TypeError: A keyword is no argument of Lightning's Trainer, or belongs in the config.
    """

    def __init__(
        self, config: TrainerConfig | Mapping[str, Any] | None = None, **objects: Any
    ) -> None:
        self.config = _validated(config)
        self.debug = self.config.debug
        self._ckpt_path_from_config = self.config.ckpt_path
        extra = _check_objects(self.config, objects)
        with using_policy(self.config.plugins):
            callbacks = resolve_callbacks(self.config, extra, copy=False)
            loggers = [*_make_loggers(self.config), *_as_list(objects.pop("logger", None), Logger)]
        kwargs = {**lightning_kwargs(self.config), **objects}
        _settle_checkpointing(self.config, kwargs, callbacks)
        if not self.config.barebones:  # Lightning refuses a logger in barebones mode
            kwargs["logger"] = loggers or False
        kwargs["callbacks"] = [*callbacks, RunRecord(self.config, objects)]
        _set_torch(self.config)
        with without_factories():
            super().__init__(**kwargs)

    @property
    @override
    def default_root_dir(self) -> str:
        """The run's directory; it is made at the first write."""
        known = self.config.run.known_directory
        if known is None and not self.is_global_zero:
            return os.fspath(self.config.directory.project_root or Path.cwd())
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
        return _with_environment(config.revalidated())
    if config is not None and not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] -- users are not type-checked
        raise TypeError(
            f"a TrainerConfig or a mapping is expected, not {type(config).__name__}; "
            f"Lightning's own arguments are fields of TrainerConfig"
        )
    return _with_environment(TrainerConfig.model_validate({} if config is None else config))


def _with_environment(config: TrainerConfig) -> TrainerConfig:
    """*config* with what Lightning's `PL_TRAINER_*` variables say about fields that it leaves open.

    Lightning would read them for the arguments in our own signature, which has none of them.
    """
    found: dict[str, Any] = {}
    for name in LightningArguments.model_fields:
        text = os.environ.get(f"PL_TRAINER_{name.upper()}")
        if text is not None and getattr(config, name) is None:
            with contextlib.suppress(ValueError, SyntaxError):
                text = ast.literal_eval(text)
            found[name] = text
    return config.replace(**found) if found else config


def _check_objects(config: TrainerConfig, objects: dict[str, Any]) -> list[Callback]:
    """Check the keywords, and take the callbacks out of them."""
    for name, value in objects.items():
        if name not in LightningArguments.model_fields and name not in NOT_IN_CONFIG:
            raise TypeError(f"{name!r} is no argument of lightning.pytorch.Trainer")
        if name == "default_root_dir":
            raise TypeError(f"'default_root_dir' is {NOT_IN_CONFIG[name]}")
        is_plain = value is None or isinstance(value, (bool, int, float, str))
        if name in LightningArguments.model_fields and is_plain:
            raise TypeError(
                f"{name}={value!r} belongs in the config: TrainerConfig({name}={value!r}), or "
                f"Trainer(config.replace({name}={value!r})); keywords are for objects"
            )
        if getattr(config, name, None) is not None and name in LightningArguments.model_fields:
            raise TypeError(f"{name!r} is given twice: in the config and as a keyword; remove one")
    return _as_list(objects.pop("callbacks", None), Callback)


def _as_list(value: Any, kind: type[Any]) -> list[Any]:
    if value is None or value is False:
        return []
    is_many = isinstance(value, Iterable) and not isinstance(value, kind)
    items: list[Any] = [*value] if is_many else [value]
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"a {kind.__name__} is expected, not {item!r}")
    return items


def _make_loggers(config: TrainerConfig) -> list[Logger]:
    if config.barebones:
        return []
    enabled = sorted((c for c in config.loggers if c.enabled), key=lambda c: -c.priority)
    return [logger for c in enabled if (logger := c.create_logger(config)) is not None]


def _settle_checkpointing(
    config: TrainerConfig, kwargs: dict[str, Any], callbacks: list[Callback]
) -> None:
    """Without a checkpoint callback of ours, Lightning would add its own behind our back."""
    saves = [c for c in callbacks if isinstance(c, Checkpoint)]
    if config.enable_checkpointing is False:
        for callback in saves:
            callbacks.remove(callback)
    elif not saves and config.enable_checkpointing is None and not config.barebones:
        kwargs["enable_checkpointing"] = False


def _set_torch(config: TrainerConfig) -> None:
    if config.set_float32_matmul_precision is not None:
        import torch

        torch.set_float32_matmul_precision(config.set_float32_matmul_precision)
    if config.seed is not None:
        pl.seed_everything(config.seed, workers=config.seed_workers, verbose=False)
