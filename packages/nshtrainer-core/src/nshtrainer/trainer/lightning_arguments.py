"""Every serializable argument of `lightning.pytorch.Trainer`, with the checks that it lacks.

A field that is None is not passed, so Lightning's own defaults, its `PL_TRAINER_*` variables and
its barebones mode keep working. Objects (a strategy, plugins) are keywords of our `Trainer`.
"""

from __future__ import annotations

import contextlib
import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, SchemaValidator, core_schema

from nshtrainer.config import Config
from nshtrainer.types import MAX_INT, NonNegativeFloat, NonNegativeInt, PositiveInt

__all__ = ["NOT_IN_CONFIG", "LightningArguments", "lightning_kwargs"]

NOT_IN_CONFIG: dict[str, str] = {
    "callbacks": "the config's own field `callbacks` and the slots",
    "logger": "the config's own field `loggers`",
    "plugins": "objects; give them to nshtrainer.Trainer(config, plugins=...)",
    "default_root_dir": "the run's directory; see the config's `directory`",
}
"""Lightning's arguments that are no field here, each with what stands for it."""


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_INT


def _batches(value: Any) -> Any:
    if _is_count(value, 0) or (isinstance(value, float) and 0.0 <= value <= 1.0):
        return value
    raise PydanticCustomError(
        "batches", "a number of batches from 0, or a fraction from 0.0 to 1.0, is expected"
    )


def _devices(value: Any) -> Any:
    if isinstance(value, str) and value == "all":
        return -1
    is_count = _is_count(value, -1) and value != 0
    is_text = isinstance(value, str) and re.fullmatch(r"auto|-1|\d+(\s*,\s*\d+)*,?", value)
    if is_count or is_text:
        return value
    indices: list[Any] = [*value] if isinstance(value, (list, tuple)) else []
    if indices and all(_is_count(index, 0) for index in indices):
        return indices
    raise PydanticCustomError(
        "devices",
        'a number of devices, "auto", "all", a list of indices, or text such as "0,1" is expected',
    )


_ISO_DURATION = SchemaValidator(core_schema.timedelta_schema())
_CLOCK = r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})"


def _duration(value: Any) -> Any:
    """Lightning's other spellings: `"DD:HH:MM:SS"` and `{"days": 1, "hours": 2}`."""
    if isinstance(value, str) and (match := re.fullmatch(_CLOCK, value.strip())):
        value = dict(
            zip(("days", "hours", "minutes", "seconds"), map(int, match.groups()), strict=True)
        )
    if isinstance(value, dict):
        try:
            return timedelta(**value)  # pyright: ignore[reportUnknownArgumentType] -- checked by the call
        except (TypeError, ValueError, OverflowError) as error:
            raise PydanticCustomError(
                "duration", "no duration: {error}", {"error": str(error)}
            ) from None
    if isinstance(value, (bool, int, float)):
        raise PydanticCustomError(
            "duration",
            'a duration needs a unit: write "00:12:00:00" (days to seconds) or "PT12H" (ISO 8601)',
        )
    return value


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise PydanticCustomError("duration", "a duration above zero is expected")
    return value


def _interval(value: Any) -> Any:
    """An int, float or duration; text is a duration."""
    value = _duration(value) if isinstance(value, (str, dict)) else value
    if isinstance(value, str):
        with contextlib.suppress(ValidationError):
            value = _ISO_DURATION.validate_python(value)
    if isinstance(value, timedelta):
        return _positive(value)
    if _is_count(value, 1) or (isinstance(value, float) and 0.0 < value <= 1.0):
        return value
    raise PydanticCustomError(
        "interval",
        "a number of batches from 1, a fraction of an epoch above 0.0 to 1.0, or a duration "
        'such as "00:01:00:00" is expected',
    )


Batches = Annotated[int | float, BeforeValidator(_batches)]
Devices = Annotated[int | str | list[int], BeforeValidator(_devices)]
Duration = Annotated[timedelta, BeforeValidator(_duration), AfterValidator(_positive)]
Interval = Annotated[int | float | timedelta, BeforeValidator(_interval)]
AtLeastMinusOne = Annotated[int, Field(strict=True, ge=-1, le=MAX_INT)]
Precision = Literal[
    16, 32, 64, "16", "32", "64", "bf16",
    "16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true",
    "transformer-engine", "transformer-engine-float16",
]  # fmt: skip


class LightningArguments(Config):
    """The arguments of Lightning's Trainer that a file can say; None leaves them to Lightning."""

    model_config = ConfigDict(defer_build=True)  # nobody validates this base by itself

    accelerator: str | None = None
    """`cpu`, `gpu`, `tpu`, `hpu`, `mps` or `auto`."""

    strategy: str | None = None
    """How to distribute: `ddp`, `fsdp`, `deepspeed`, ..., or `auto`."""

    devices: Devices | None = None
    """How many devices, or which ones; `auto` or `all`."""

    num_nodes: PositiveInt | None = None
    """Number of machines."""

    precision: Precision | None = None
    """`32-true`, `16-mixed`, `bf16-mixed`, `bf16-true`, `64-true`, ..."""

    fast_dev_run: bool | NonNegativeInt | None = None
    """Run one batch (or this many) of everything, to see that the code works."""

    max_epochs: AtLeastMinusOne | None = None
    """Stop after this many epochs; -1 is never."""

    min_epochs: NonNegativeInt | None = None
    """Train at least this many epochs."""

    max_steps: AtLeastMinusOne | None = None
    """Stop after this many optimizer steps; -1 is never."""

    min_steps: NonNegativeInt | None = None
    """Train at least this many optimizer steps."""

    max_time: Duration | None = None
    """Stop after this wall time: `"00:12:00:00"` (days to seconds) or `"PT12H"`."""

    limit_train_batches: Batches | None = None
    """Training batches of an epoch: a number, or a fraction."""

    limit_val_batches: Batches | None = None
    """Validation batches: a number, or a fraction."""

    limit_test_batches: Batches | None = None
    """Test batches: a number, or a fraction."""

    limit_predict_batches: Batches | None = None
    """Prediction batches: a number, or a fraction."""

    overfit_batches: Batches | None = None
    """Train and validate on this many (or this fraction of) training batches."""

    val_check_interval: Interval | None = None
    """Validate after this many batches, this fraction of an epoch, or this wall time."""

    check_val_every_n_epoch: PositiveInt | Literal[False] | None = None
    """Validate every this many epochs; false counts `val_check_interval` across epochs."""

    num_sanity_val_steps: AtLeastMinusOne | None = None
    """Validation batches to try before training; -1 is all."""

    log_every_n_steps: NonNegativeInt | None = None
    """How often step metrics are logged; Lightning's default is 50."""

    enable_checkpointing: bool | None = None
    """False saves nothing at all."""

    enable_progress_bar: bool | None = None
    """Whether a progress bar is shown."""

    enable_model_summary: bool | None = None
    """Whether a table of the model's layers is shown."""

    accumulate_grad_batches: PositiveInt | None = None
    """Batches whose gradients are added up before an optimizer step."""

    gradient_clip_val: NonNegativeFloat | None = None
    """Clip gradients at this norm or value; 0 does not clip."""

    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    """Clip the total norm or each element."""

    deterministic: bool | Literal["warn"] | None = None
    """Whether PyTorch must use deterministic algorithms."""

    benchmark: bool | None = None
    """Whether cuDNN tries out algorithms."""

    inference_mode: bool | None = None
    """Whether evaluation runs under `torch.inference_mode` instead of `torch.no_grad`."""

    use_distributed_sampler: bool | None = None
    """Whether samplers are made distributed."""

    profiler: Literal["simple", "advanced", "pytorch", "xla"] | None = None
    """Which profiler to run under."""

    detect_anomaly: bool | None = None
    """Whether autograd looks for NaN in the backward pass; slow."""

    barebones: bool | None = None
    """Whether everything that costs speed is left out."""

    sync_batchnorm: bool | None = None
    """Whether BatchNorm statistics are shared between processes."""

    reload_dataloaders_every_n_epochs: NonNegativeInt | None = None
    """Make the data loaders anew every this many epochs; 0 is never."""

    enable_autolog_hparams: bool | None = None
    """Whether `save_hyperparameters` values are logged."""

    model_registry: str | None = None
    """Name of a model in a litmodels registry."""


def lightning_kwargs(config: LightningArguments) -> dict[str, Any]:
    """The keyword arguments for `lightning.pytorch.Trainer` that *config* sets."""
    found = {n: getattr(config, n) for n in LightningArguments.model_fields}
    kwargs = {name: value for name, value in found.items() if value is not None}
    if kwargs.get("check_val_every_n_epoch") is False:
        kwargs["check_val_every_n_epoch"] = None
    return kwargs
