"""Configurations of the checkpoint callbacks; importing this reads no torch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from typing_extensions import override

from nshtrainer.callbacks.base import (
    CallbackConfigBase,
    CallbackMetadataConfig,
    callback_registry,
)
from nshtrainer.errors import ConfigError
from nshtrainer.metric import MetricConfig
from nshtrainer.types import PositiveInt

from .places import LinkPolicy, checked_place

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = [
    "BestCheckpointCallbackConfig",
    "CheckpointSavingConfig",
    "LastCheckpointCallbackConfig",
    "OnExceptionCheckpointCallbackConfig",
]

log = logging.getLogger(__name__)


def _checked(value: Any) -> Any:
    return checked_place(value) if isinstance(value, (str, Path)) else value


def _no_number(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        raise ValueError(  # noqa: TRY004 -- pydantic reports ValueError
            f"{value!r} has no unit; give a timedelta, or text such as '01:30:00' or 'PT90M'"
        )
    return value


Folder = Annotated[Path | str, BeforeValidator(_checked)]
Interval = Annotated[timedelta, BeforeValidator(_no_number), Field(gt=timedelta(0))]


def _size(value: Any, handler: ValidatorFunctionWrapHandler) -> ByteSize:
    try:
        if not isinstance(value, bool):
            return handler(value)
    except OverflowError:  # '1e999TB', with pydantic 2.12
        pass
    raise ValueError(f"{value!r} is no size; give bytes, or text such as '20GB'")


Size = Annotated[ByteSize, WrapValidator(_size), Field(gt=0)]
OnSaveError = Literal["raise", "warn"]
PreemptionSignal = Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]


# Nobody validates the two bases by themselves, and building a validator is most of an import's time.
class _CheckpointConfig(CallbackConfigBase, defer_build=True):
    """What the three have in common."""

    dirpath: Folder | None = None
    """Folder in which the callback makes its own: a path, or a URL that fsspec reaches, such as
    `s3://bucket/run`. None is `checkpoint` in the run's directory."""

    filename: str | None = None
    """Template of the file name, without extension, such as `{epoch}-{val/loss:.3f}`."""

    @field_validator("filename")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None:
            from .names import NameTemplate

            NameTemplate.parse(value, cls._examples())
        return value

    @classmethod
    def _examples(cls) -> dict[str, float | str]:
        return {"epoch": 0, "step": 0}


class _PolicyConfig(_CheckpointConfig):
    """What best and last have in common: when to save, what to keep, and how it is written."""

    topk: PositiveInt | Literal["all"] = 1
    """How many checkpoints to keep."""

    max_total_bytes: Size | None = None
    """What those that are kept may occupy together, in bytes or as text such as `"20GB"`: fewer than
    `topk` are kept where they are too large, but always the first one."""

    every_n_steps: PositiveInt | None = None
    """Save also after each this many optimizer steps."""

    every_n_epochs: PositiveInt | None = None
    """Save also at the end of each this many epochs."""

    on_validation_end: bool = True
    """Save when a validation has ended; in a run without validation, when an epoch has ended."""

    save_weights_only: bool = False
    """Leave out optimizers, schedulers and callbacks; such a checkpoint cannot be resumed from."""

    save_symlink: bool = True
    """Keep a link to the first one, beside the folder; how is what `links` says."""

    links: LinkPolicy | None = None
    """How the link is made: `symlink`, `hardlink`, `copy`, `pointer` (a small JSON file that names
    the checkpoint) or `none`. What is not possible falls back to the next; stores of objects get a
    pointer. None is what `CheckpointSavingConfig` says, else `symlink`."""

    async_save: bool | None = None
    """Write in the background: training waits only for a copy of the state in memory. None is what
    `CheckpointSavingConfig` says, else False."""

    on_save_error: OnSaveError | None = None
    """When a checkpoint cannot be written, after several tries: stop with the error (`raise`), or log
    it and train on (`warn`). None is what `CheckpointSavingConfig` says, else `raise`."""

    trial: bool | None = None
    """Save once before the first step, to see how large and slow that is and whether there is room for
    all that is kept and one more. None is what `CheckpointSavingConfig` says, else False."""


class BestCheckpointCallbackConfig(_PolicyConfig, defer_build=False):
    """Keeps the checkpoints with the best values of a metric.

    It acts when a validation has ended (in a run without validation, when an epoch has ended), and
    when else it is told to, but then only if the metric has just been logged. A value that is NaN,
    infinite or was not logged ranks behind every number. The link is `best_<metric>.ckpt`.
    """

    name: Literal["best_checkpoint"] = "best_checkpoint"

    metadata: CallbackMetadataConfig = Field(
        default_factory=lambda: CallbackMetadataConfig(priority=1)
    )
    """Earlier than the other checkpoint callbacks: Lightning asks the first one for `"best"`."""

    metric: MetricConfig | None = None
    """The metric; None is the run's `primary_metric`."""

    throw_on_no_metric: bool = True
    """Without any metric: an error (True), or no checkpoints (False)."""

    @property
    @override
    def identity(self) -> str:
        """Holds the metric, so that several metrics have their best checkpoints side by side."""
        metric = "" if self.metric is None else f"[{self.metric.name}]"
        return f"{self.name}{metric}" + (f"#{self.label}" if self.label else "")

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        """Yield the callback.

        Raises:
            ConfigError: There is neither a metric nor a primary metric, and `throw_on_no_metric`.
        """
        metric = self.metric or trainer_config.primary_metric
        if metric is None and self.throw_on_no_metric:
            raise ConfigError(
                "a best checkpoint needs a metric and there is none; set `metric` in "
                "BestCheckpointCallbackConfig or `primary_metric` in TrainerConfig, or "
                "`throw_on_no_metric=False` to go without"
            )
        if metric is None:
            log.info("no best checkpoint is kept, since no `primary_metric` is set")
        elif not trainer_config.fast_dev_run:
            from .callback import BestCheckpointCallback

            yield BestCheckpointCallback(
                self.replace(metric=metric),
                run=trainer_config.run,
                folder_name=self._folder_name(metric, trainer_config),
            )

    def _folder_name(self, metric: MetricConfig, trainer_config: TrainerConfig) -> str:
        """`best_<metric>`, made distinct where another metric's name looks the same in a path."""
        from .names import slug

        name = f"best_{slug(metric.name)}"
        alike = {m.name for m in _best_metrics(trainer_config) if slug(m.name) == slug(metric.name)}
        if len(alike) > 1 and metric.name != slug(metric.name):
            name += f"-{hashlib.sha256(metric.name.encode()).hexdigest()[:6]}"
        return f"{name}-{self.label}" if self.label else name


class LastCheckpointCallbackConfig(_PolicyConfig, defer_build=False):
    """Keeps the newest checkpoints.

    It acts when a validation has ended (in a run without validation, when an epoch has ended), at
    the end of training if there were steps since, and when else it is told to; each option adds
    moments to those of the others. The link is `last.ckpt`.
    """

    name: Literal["last_checkpoint"] = "last_checkpoint"

    on_train_end: bool = True
    """Save at the end of training, if there were steps since the last save."""

    keep_every_n_steps: PositiveInt | None = None
    """Save also after each this many optimizer steps, and never delete these: milestones, beside the
    `topk` newest ones."""

    before_validation: bool = False
    """Save also before each validation, so that one that fails costs no steps."""

    save_on_time_interval: Interval | None = None
    """Save also when this much time has passed since the last save, by rank 0's clock."""

    preemption_signals: list[PreemptionSignal] | None = None
    """Save also when one of these arrives, on whatever rank, after the optimizer step it falls into.
    SIGTERM then ends training as Lightning does; after the others it goes on. None is what
    `CheckpointSavingConfig` says, else SIGTERM and SIGUSR1; an empty list leaves signals alone."""

    @classmethod
    @override
    def _examples(cls) -> dict[str, float | str]:
        return {**super()._examples(), "train_duration": "1h_2m_3s"}

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if not trainer_config.fast_dev_run:
            from .callback import LastCheckpointCallback

            yield LastCheckpointCallback(self, run=trainer_config.run)


class OnExceptionCheckpointCallbackConfig(_CheckpointConfig, defer_build=False):
    """Saves once more when training stops with an exception, Ctrl-C included."""

    name: Literal["on_exception_checkpoint"] = "on_exception_checkpoint"

    @classmethod
    @override
    def _examples(cls) -> dict[str, float | str]:
        return {**super()._examples(), "id": "abcd2345"}

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if not trainer_config.fast_dev_run:
            from .on_exception import OnExceptionCheckpointCallback

            yield OnExceptionCheckpointCallback(self, run=trainer_config.run)


if TYPE_CHECKING:
    _Saving = (
        BestCheckpointCallbackConfig
        | LastCheckpointCallbackConfig
        | OnExceptionCheckpointCallbackConfig
    )
else:
    _Saving = Annotated[
        CallbackConfigBase,
        callback_registry.slot("best_checkpoint", "last_checkpoint", "on_exception_checkpoint"),
    ]


def _default_callbacks() -> list[Any]:
    return [
        BestCheckpointCallbackConfig(throw_on_no_metric=False),
        LastCheckpointCallbackConfig(),
        OnExceptionCheckpointCallbackConfig(),
    ]


_SHARED = ("async_save", "on_save_error", "trial", "links", "preemption_signals")


class CheckpointSavingConfig(CallbackConfigBase):
    """All checkpoints of a run: by default the best, the last and one on an exception."""

    name: Literal["checkpoint_saving"] = "checkpoint_saving"

    enabled: bool = True
    """False saves nothing at all."""

    checkpoint_callbacks: list[_Saving] = Field(default_factory=_default_callbacks)
    """What to save; an empty list saves nothing."""

    async_save: bool = False
    """Write in the background: training waits only for a copy of the state in memory."""

    on_save_error: OnSaveError = "raise"
    """When a checkpoint cannot be written, after several tries: stop with the error (`raise`), or log
    it and train on (`warn`); the older checkpoints are as they were."""

    trial: bool = False
    """Save once before the first step, to see how large and slow that is and whether there is room for
    all that is kept and one more; if not, the run does not start."""

    links: LinkPolicy = "symlink"
    """How `last.ckpt` and `best_<metric>.ckpt` lead to checkpoints: `symlink`, `hardlink`, `copy`,
    `pointer` or `none`, with a fall-back to the next where one is not possible."""

    preemption_signals: list[PreemptionSignal] = Field(
        default_factory=lambda: ["SIGTERM", "SIGUSR1"]
    )
    """Signals on which the last checkpoint is saved, as clusters send them before they take a machine
    back; an empty list leaves signals alone."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled and not trainer_config.fast_dev_run:
            for config in self.checkpoint_callbacks:
                yield from self._with_shared(config).build(trainer_config)

    def _with_shared(self, config: CallbackConfigBase) -> CallbackConfigBase:
        """*config* with what it leaves open taken from here."""
        fields = type(config).model_fields
        left_open = [n for n in _SHARED if n in fields and getattr(config, n) is None]
        return config.replace(**{n: getattr(self, n) for n in left_open}) if left_open else config


def _best_metrics(trainer_config: TrainerConfig) -> Iterator[MetricConfig]:
    configs = list(trainer_config.callbacks)
    saving: Any = trainer_config.checkpoint_saving
    for held in (saving, *trainer_config.callbacks):
        if isinstance(held, CheckpointSavingConfig):
            configs += held.checkpoint_callbacks
    for config in configs:
        if isinstance(config, BestCheckpointCallbackConfig):
            metric = config.metric or trainer_config.primary_metric
            if metric is not None:
                yield metric
