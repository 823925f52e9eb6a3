"""A callback that keeps every promise passes every clause, under pytest as its author runs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, CallbackMetadataConfig, callback_registry
from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.testing import CallbackConformance
from nshtrainer.types import PositiveFloat

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig


@callback_registry.register
class RunningLossConfig(CallbackConfigBase):
    """Keeps a running mean of the training loss and logs it; holds weights while validating."""

    name: Literal["conformance_running_loss"] = "conformance_running_loss"

    decay: PositiveFloat = 0.9
    """How much of the old mean is kept."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        yield RunningLossCallback(self)


class RunningLossCallback(ConfiguredCallback[RunningLossConfig]):
    config_class = RunningLossConfig

    def __init__(self, config: RunningLossConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.mean: torch.Tensor | None = None
        self.handle: Any = None
        self.held: dict[str, torch.Tensor] = {}

    def setup(self, trainer, pl_module, stage):
        self.handle = pl_module.register_forward_hook(lambda *_: None)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach() if outputs else torch.zeros(())
        old = loss if self.mean is None else self.mean
        self.mean = self.config.decay * old + (1 - self.config.decay) * loss
        every = trainer.log_every_n_steps
        if every and (trainer.global_step + 1) % every == 0:
            trainer.callback_metrics["mean_loss"] = torch.tensor(self.mean.item())

    def on_validation_start(self, trainer, pl_module):
        self.held = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)

    def on_validation_end(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if name in self.held:
                parameter.data.copy_(self.held[name])
        self.held = {}

    def teardown(self, trainer, pl_module, stage):
        self.handle.remove()

    def on_exception(self, trainer, pl_module, exception):
        self.on_validation_end(trainer, pl_module)
        self.handle.remove()

    def state_dict(self):
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state_dict):
        self.mean = state_dict["mean"]


class TestConforming(CallbackConformance):
    config = RunningLossConfig(decay=0.5)


class TestWithALogger(CallbackConformance):
    """Plain trainers have the logger that the class asks for."""

    config = RunningLossConfig(decay=0.5)

    def logger(self, config):
        return CSVLogger(config.directory.project_root)

    def test_trains_with_it(self, tmp_path):
        trainer = self.plain_trainer(self.trainer_config(tmp_path), [])
        self.expect_fit(trainer)

        assert [type(logger) for logger in trainer.loggers] == [CSVLogger]
        assert next(tmp_path.rglob("metrics.csv")).read_text().startswith("epoch,")


class TestKeptInBarebones(CallbackConformance):
    config = RunningLossConfig(metadata=CallbackMetadataConfig(enabled_for_barebones=True))


@callback_registry.register
class LightningCheckpointConfig(CallbackConfigBase):
    """Lightning's own checkpoint callback, which writes into the run's directory."""

    name: Literal["conformance_model_checkpoint"] = "conformance_model_checkpoint"

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        folder = trainer_config.run.directory.subdirectory("checkpoint")
        yield ModelCheckpoint(folder, monitor="val_loss", save_top_k=2)


class TestLightningsCheckpoint(CallbackConformance):
    """A `Checkpoint`, with paths in its state."""

    config = LightningCheckpointConfig()
    not_compared = ("current_score",)


@callback_registry.register
class SkipAllConfig(CallbackConfigBase):
    """Takes the gradients away; only for modules that Lightning steps."""

    name: Literal["conformance_skip_all"] = "conformance_skip_all"

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        yield SkipAll()


class SkipAll(Callback):
    def on_fit_start(self, trainer, pl_module):
        from nshtrainer.errors import ConfigError

        if not pl_module.automatic_optimization:
            raise ConfigError("needs automatic optimization")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            if parameter.grad is not None and parameter.grad.sum().item() == parameter.grad.sum():
                parameter.grad = None


class TestDeclaredExceptions(CallbackConformance):
    """What a class declares is not held against it."""

    config = SkipAllConfig()
    changes_training = True
    syncs_every_step = True
    resumes_exactly = False
    supports_manual_optimization = False


def test_a_conformance_class_is_skipped_where_it_documents_an_exception(tmp_path):
    """A flag skips its clause visibly instead of passing it."""
    with pytest.raises(pytest.skip.Exception, match="documents"):
        TestDeclaredExceptions().test_adds_no_host_sync(tmp_path)
