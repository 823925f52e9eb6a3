"""`TrainerConfig`: a whole training run as one typed, serializable value."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from typing_extensions import Self

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.directory import DirectoryConfig
from nshtrainer.loggers.base import LoggerConfigBase, logger_registry
from nshtrainer.metric import MetricConfig
from nshtrainer.plugins.manifest import manifest
from nshtrainer.plugins.policy import PluginsConfig, Policy, is_strict, using_policy
from nshtrainer.plugins.state import PluginState
from nshtrainer.types import PlainData

from .lightning_arguments import LightningArguments

if TYPE_CHECKING:
    from nshtrainer.run.run import Run
    from nshtrainer_checkpoint.config import CheckpointSavingConfig as CheckpointSaving
    from nshtrainer_ema.early_stopping.config import EarlyStoppingCallbackConfig as EarlyStopping
    from nshtrainer_ema.shared_parameters.config import (
        SharedParametersCallbackConfig as SharedParameters,
    )
    from nshtrainer_monitoring.debug_flag.config import DebugFlagCallbackConfig as DebugFlag
    from nshtrainer_monitoring.log_epoch.config import LogEpochCallbackConfig as LogEpoch
    from nshtrainer_monitoring.lr_monitor.config import LearningRateMonitorConfig as LRMonitor
    from nshtrainer_monitoring.metric_validation.config import (
        MetricValidationCallbackConfig as MetricValidation,
    )
    from nshtrainer_monitoring.norm_logging.config import NormLoggingCallbackConfig as NormLogging
else:
    CheckpointSaving, EarlyStopping, SharedParameters, DebugFlag, LogEpoch, LRMonitor = (
        Annotated[CallbackConfigBase, callback_registry.slot(name)]
        for name in (
            "checkpoint_saving", "early_stopping", "shared_parameters",
            "debug_flag", "log_epoch", "learning_rate_monitor",
        )
    )  # fmt: skip
    MetricValidation = Annotated[CallbackConfigBase, callback_registry.slot("metric_validation")]
    NormLogging = Annotated[CallbackConfigBase, callback_registry.slot("norm_logging")]

__all__ = ["SLOTS", "TrainerConfig"]

log = logging.getLogger(__name__)

SLOTS: dict[str, str] = {
    "checkpoint_saving": "checkpoint_saving",
    "early_stopping": "early_stopping",
    "lr_monitor": "learning_rate_monitor",
    "log_epoch": "log_epoch",
    "log_norms": "norm_logging",
    "shared_parameters": "shared_parameters",
    "auto_set_debug_flag": "debug_flag",
    "auto_validate_metrics": "metric_validation",
}
"""Slot -> the name of the callback it holds, in the order in which their callbacks are made."""


def _if_installed(name: str) -> Callable[[], Any]:
    """Default of a slot that is on by itself: the callback with its defaults, if it can be used."""

    def default() -> CallbackConfigBase | None:
        found = callback_registry.resolve(name)
        if isinstance(found, PluginState):
            if found.kind != "disabled":
                _warn_once(str(found))
            return None
        return None if found is None else _with_defaults(name, found)

    return default


def _with_defaults(name: str, cls: type[CallbackConfigBase]) -> CallbackConfigBase | None:
    try:
        return cls()
    except Exception as error:
        if is_strict():
            raise
        reasons = (
            "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
            if isinstance(error, ValidationError)
            else f"{type(error).__name__}: {error}"
        )
        _warn_once(
            f"the callback {name!r} is on by default, but {cls.__module__}.{cls.__qualname__} cannot be "
            f"made without options ({reasons})"
        )
        return None


MAX_SEED = 2**32 - 1
"""The largest seed that NumPy takes."""


@functools.lru_cache(maxsize=64)
def _warn_once(problem: str) -> None:
    log.warning("%s; it is left out", problem)


def _default_loggers() -> list[Any]:
    return [logger_registry["csv"]()]


class TrainerConfig(LightningArguments):
    """Everything that a file can say about a training run.

    Slots are fields for common callbacks; None (in files also `false`) switches one off. A callback
    in `callbacks` takes the place of the one of the same name in a slot.
    """

    model_config = ConfigDict(defer_build=False)

    id: str | None = None
    """Identifies the run, and names its folder; None makes one when the run starts."""

    name: list[str] = Field(default_factory=list[str])
    """Parts of the run's display name; one text is a list of one."""

    project: str | None = None
    """The project that the run belongs to, for loggers that have such."""

    tags: list[str] = Field(default_factory=list[str])
    """Words to find the run by."""

    notes: list[str] = Field(default_factory=list[str])
    """Remarks about the run."""

    meta: dict[str, PlainData] = Field(default_factory=dict[str, Any])
    """Anything else to keep with the run: text, numbers, lists, mappings."""

    debug: bool = False
    """Where `trainer.debug` starts."""

    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = None
    """Seeds Python, NumPy and torch before training (`lightning.seed_everything`)."""

    seed_workers: bool = False
    """Whether data loader workers are seeded from `seed` too."""

    directory: DirectoryConfig = Field(default_factory=DirectoryConfig)
    """Where the run writes."""

    primary_metric: MetricConfig | None = None
    """The metric that decides what is best, unless a callback has its own."""

    ckpt_path: str | None = None
    """Checkpoint to start the first `fit` from: a path, `last`, `best` or `hpc`; `auto` is the newest one
    of this run, or a start from scratch without one; `none` is None."""

    loggers: list[Annotated[LoggerConfigBase, logger_registry]] = Field(
        default_factory=_default_loggers
    )
    """Where metrics go; CSV files by default, null is the default, an empty list is nowhere."""

    callbacks: list[Annotated[CallbackConfigBase, callback_registry]] = Field(
        default_factory=list[CallbackConfigBase]
    )
    """Every other callback."""

    plugins: PluginsConfig = Field(default_factory=PluginsConfig)
    """Which installed plugins this run may use."""

    checkpoint_saving: CheckpointSaving | None = Field(
        default_factory=_if_installed("checkpoint_saving")
    )
    """Best, last and on-exception checkpoints; on by default where nshtrainer-checkpoint is."""

    early_stopping: EarlyStopping | None = None
    """Stops when a metric does not improve any more."""

    lr_monitor: LRMonitor | None = Field(default_factory=_if_installed("learning_rate_monitor"))
    """Logs learning rates; on by default where nshtrainer-monitoring is."""

    log_epoch: LogEpoch | None = Field(default_factory=_if_installed("log_epoch"))
    """Logs the epoch as a fraction; on by default where nshtrainer-monitoring is."""

    log_norms: NormLogging | None = None
    """Logs gradient and parameter norms."""

    shared_parameters: SharedParameters | None = None
    """Scales the gradients of shared parameters."""

    auto_set_debug_flag: DebugFlag | None = Field(default_factory=_if_installed("debug_flag"))
    """Sets `trainer.debug` in fast dev runs and the sanity check; on where nshtrainer-monitoring is."""

    auto_validate_metrics: MetricValidation | None = None
    """Checks that expected metrics are logged."""

    set_float32_matmul_precision: Literal["medium", "high", "highest"] | None = None
    """See `torch.set_float32_matmul_precision`."""

    # ---- reading ---------------------------------------------------------------------------

    @model_validator(mode="wrap")
    @classmethod
    def _under_own_policy(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The config's `plugins` acts before anything else is looked up."""
        with using_policy(_plugins_of(data)):
            return handler(data)

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator("name", "tags", "notes", mode="before")
    @classmethod
    def _one_text_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("loggers", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        return _default_loggers() if value is None else value

    @field_validator("ckpt_path", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("ckpt_path")
    @classmethod
    def _none_is_none(cls, value: str | None) -> str | None:
        return None if value in ("none", "") else value

    @field_validator("id")
    @classmethod
    def _safe_id(cls, value: str | None) -> str | None:
        if value is None:  # the import below is not worth its time for nothing
            return None
        from nshtrainer.run.identity import validate_run_id

        return validate_run_id(value)

    @field_validator("plugins")
    @classmethod
    def _known_plugins(cls, value: PluginsConfig) -> PluginsConfig:
        policy = Policy(allow=value.allow, disable=value.disable, prefer={}, source="plugins")
        known = {name for e in manifest() for name in (e.dist, e.name)}
        for name, close in policy.unknown_names(known):
            hint = f"; did you mean {close!r}?" if close else ""
            warnings.warn(f"`plugins` names {name!r}, which is not installed{hint}", stacklevel=2)
        return value

    # ---- the run ---------------------------------------------------------------------------

    @property
    def full_name(self) -> str:
        """The parts of the name, joined by blanks."""
        return " ".join(self.name)

    @property
    def run(self) -> Run:
        """The run that this config describes: id and directory, settled when it starts.

        It is another one after `id` or `directory` was changed; a plain copy goes on with it.
        """
        held: Run | None = vars(self).get(_RUN)
        if held is None or not held.is_of(self.directory, self.id):
            from nshtrainer.run.run import Run

            held = vars(self)[_RUN] = Run(self.directory, self.id)
        return held

    def reset_run(self) -> Self:
        """Return a copy for a new run: without id and checkpoint to start from."""
        return self.replace(id=None, ckpt_path=None)


_RUN = "_run_of_this_config"  # no private attribute: those count when configs are compared


def _plugins_of(data: Any) -> PluginsConfig | None:
    if isinstance(data, TrainerConfig):
        return data.plugins
    raw = cast("Mapping[str, Any]", data).get("plugins") if isinstance(data, Mapping) else None
    try:
        return None if raw is None else PluginsConfig.model_validate(raw)
    except ValidationError:
        return None  # the field's own validation says what is wrong
