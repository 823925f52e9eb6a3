"""The public interface as users type it; checked by `uv run just types`, never executed.

`assert_type` fails where a type is lost: a registered class that decays to its base, a slot that
forgets which callback it holds, a constructor that takes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import click
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import assert_type, final, override

import nshtrainer
from nshtrainer import (
    CallbackConfigBase,
    CallbackMetadataConfig,
    Config,
    ConfiguredCallback,
    LoggerConfigBase,
    MetricConfig,
    Registry,
    Trainer,
    TrainerConfig,
    callback_registry,
    create_callbacks,
    hookimpl,
    logger_registry,
    plugin_manager,
    resolve_callbacks,
)
from nshtrainer.configs import (
    BestCheckpointCallbackConfig,
    CheckpointSavingConfig,
    CSVLoggerConfig,
    DebugFlagCallbackConfig,
    EarlyStoppingCallbackConfig,
    EMACallbackConfig,
    LearningRateMonitorConfig,
    LogEpochCallbackConfig,
    MetricValidationCallbackConfig,
    NormLoggingCallbackConfig,
    SharedParametersCallbackConfig,
    WandbLoggerConfig,
)
from nshtrainer.testing import CallbackConformance, LoggerConformance, TinyModule
from nshtrainer.types import PositiveInt
from nshtrainer_ema import EMACallback

# ---- a run, described --------------------------------------------------------------------------

config = TrainerConfig(
    name=["sweep", "7"],
    primary_metric=MetricConfig(name="val_loss", mode="min"),
    max_epochs=3,
    precision="bf16-mixed",
    early_stopping=EarlyStoppingCallbackConfig(patience=10, min_delta=1e-4),
    log_norms=NormLoggingCallbackConfig(log_grad_norm=True),
    loggers=[CSVLoggerConfig(), WandbLoggerConfig(offline=True)],
    callbacks=[EMACallbackConfig(decay=0.999), BestCheckpointCallbackConfig(topk=2)],
)

assert_type(config.checkpoint_saving, CheckpointSavingConfig | None)
assert_type(config.early_stopping, EarlyStoppingCallbackConfig | None)
assert_type(config.lr_monitor, LearningRateMonitorConfig | None)
assert_type(config.log_epoch, LogEpochCallbackConfig | None)
assert_type(config.log_norms, NormLoggingCallbackConfig | None)
assert_type(config.shared_parameters, SharedParametersCallbackConfig | None)
assert_type(config.auto_set_debug_flag, DebugFlagCallbackConfig | None)
assert_type(config.auto_validate_metrics, MetricValidationCallbackConfig | None)
assert_type(config.callbacks, list[CallbackConfigBase])
assert_type(config.loggers, list[LoggerConfigBase])

if config.early_stopping is not None:
    assert_type(config.early_stopping.patience, int)

config.early_stopping = None
config.callbacks.append(EMACallbackConfig(decay=0.9))
config.callbacks = [*config.callbacks, EMACallbackConfig(decay=0.99, label="slow")]

config.log_norms = EMACallbackConfig(decay=0.9)  # pyright: ignore[reportAttributeAccessIssue] -- a slot holds its own callback only
EMACallbackConfig(decay=0.9, no_such_option=1)  # pyright: ignore[reportCallIssue] -- a misspelt option
EMACallbackConfig(decay="fast")  # pyright: ignore[reportArgumentType] -- text is no number
MetricConfig(name="val_loss", mode="least")  # pyright: ignore[reportArgumentType] -- min or max

assert_type(config.replace(max_epochs=5), TrainerConfig)
assert_type(config.revalidated(), TrainerConfig)
assert_type(config.reset_run(), TrainerConfig)
assert_type(TrainerConfig.from_file("run.yaml"), TrainerConfig)
assert_type(EMACallbackConfig.from_text("{decay: 0.9}", "yaml"), EMACallbackConfig)
assert_type(config.to_file(Path("run.yaml")), Path)

# ---- three ways to train -----------------------------------------------------------------------

trainer = Trainer(config, strategy=DDPStrategy(), callbacks=[pl.Callback()])
assert_type(trainer.config, TrainerConfig)
trainer.fit(TinyModule(), ckpt_path="last")
Trainer({"max_epochs": 1})
Trainer.config_from_checkpoint("last.ckpt").replace(id=None)
Trainer(10)  # pyright: ignore[reportArgumentType] -- neither a config nor a mapping

assert_type(
    create_callbacks(["ema", {"name": "ema"}, EMACallbackConfig(decay=0.9)]), list[Callback]
)
assert_type(create_callbacks(config, primary_metric=None), list[Callback])
assert_type(resolve_callbacks(config), list[Callback])
plain = pl.Trainer(callbacks=[*create_callbacks(["log_epoch"]), EMACallback(decay=0.999)])

# ---- a callback of one's own -------------------------------------------------------------------


@final
@callback_registry.register
class MyCallbackConfig(CallbackConfigBase):
    """Keeps its own type behind the decorator."""

    name: Literal["mine"] = "mine"
    metadata: CallbackMetadataConfig = CallbackMetadataConfig(priority=10)
    every_n_steps: PositiveInt = 50

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterator[Callback]:
        metric = trainer_config.primary_metric
        assert_type(metric, MetricConfig | None)
        yield MyCallback(self)


@callback_registry.register(override=True)
class OtherCallbackConfig(CallbackConfigBase):
    """So it does with arguments."""

    name: Literal["other"] = "other"
    strength: float = 1.0

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        return [MyCallback(every_n_steps=3)]


class MyCallback(ConfiguredCallback[MyCallbackConfig]):
    """Knows the class of its configuration."""

    config_class = MyCallbackConfig

    def __init__(self, config: MyCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        assert_type(self.config, MyCallbackConfig)
        assert_type(self.config.every_n_steps, int)


assert_type(MyCallbackConfig().every_n_steps, int)
assert_type(MyCallbackConfig().replace(every_n_steps=2), MyCallbackConfig)
assert_type(OtherCallbackConfig(strength=2.0).strength, float)
assert_type(MyCallbackConfig().identity, str)
assert_type(callback_registry, Registry[CallbackConfigBase])
assert_type(callback_registry["mine"], type[CallbackConfigBase])
assert_type(callback_registry.get("mine"), type[CallbackConfigBase] | None)


@logger_registry.register
class MyLoggerConfig(LoggerConfigBase):
    """A logger of one's own."""

    name: Literal["mine"] = "mine"
    url: str

    @override
    def create_logger(self, trainer_config: TrainerConfig) -> Logger | None:
        return None


assert_type(MyLoggerConfig(url="x").url, str)

# ---- a registry and a configuration of one's own ------------------------------------------------


class Model(Config):
    """A configuration that is no callback."""

    width: PositiveInt = 1


assert_type(Model().replace(width=2), Model)
models: Registry[Model] = Registry("acme.models", Model, what="model")
assert_type(models["mlp"], type[Model])

# ---- hooks -------------------------------------------------------------------------------------


@hookimpl
def nshtrainer_default_callbacks(config: TrainerConfig) -> Iterable[CallbackConfigBase]:
    """Stays a function that can be called."""
    return [] if config.fast_dev_run else [MyCallbackConfig()]


@hookimpl
def nshtrainer_cli(app: click.Group) -> None:
    """Adds nothing."""


assert_type(nshtrainer_default_callbacks(config), Iterable[CallbackConfigBase])
plugin_manager.register(object(), "mine")

# ---- the author's kit --------------------------------------------------------------------------


class TestMine(CallbackConformance):
    """Two lines."""

    config = MyCallbackConfig(every_n_steps=2)
    trainer_fields = {"primary_metric": {"name": "val_loss", "mode": "min"}}  # noqa: RUF012 -- as users write it


class TestMyLogger(LoggerConformance):
    """Two lines."""

    config = MyLoggerConfig(url="x")


assert_type(nshtrainer.manifest().digest, str)
