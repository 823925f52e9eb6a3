"""Each clause of `CallbackConformance` rejects a callback that breaks it, and says what to do."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, CallbackMetadataConfig, callback_registry
from nshtrainer.testing import BrokenPromiseError, CallbackConformance

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

# ---- callbacks that are broken at run time ---------------------------------------------------


class Base(Callback):
    """Not broken; keeps a count, restores it."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


SHARED: dict[str, int] = {}


class SharesDict(Base):
    def __init__(self):
        super().__init__()
        self.cache = SHARED


class SharesHelper(Base):
    def __init__(self):
        super().__init__()
        self.helper = Helper()


class Helper:
    def __init__(self):
        self.seen = SHARED


class UnstableKey(Base):
    @property
    def state_key(self):
        return f"unstable-{id(self)}"


class Unpicklable(Base):
    def __init__(self):
        super().__init__()
        self.function = lambda: None


class NeedsOurTrainer(Base):
    def on_fit_start(self, trainer, pl_module):
        _ = trainer.config


class NeedsPlainTrainer(Base):
    def on_fit_start(self, trainer, pl_module):
        if type(trainer) is not Trainer:
            raise RuntimeError("not my trainer")


class NeedsLogger(Base):
    def on_train_start(self, trainer, pl_module):
        _ = trainer.logger.log_dir


class HooksPileUp(Base):
    def on_fit_start(self, trainer, pl_module):
        pl_module.body.register_forward_hook(lambda *_: None)


class OnlyOnce(Base):
    def setup(self, trainer, pl_module, stage):
        if self.count:
            raise RuntimeError("used before")
        self.count = 1


class StopsEarly(Base):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = True


class NeedsAStepEachBatch(Base):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        if trainer.global_step < self.count:
            raise RuntimeError("no step in this batch")


class NeedsOneOptimizer(Base):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.optimizers().param_groups[0]["lr"] *= 1.0


class NeedsFit(Base):
    def setup(self, trainer, pl_module, stage):
        if stage != "fit":
            raise RuntimeError(f"what is {stage}?")


class RefusesFastDevRun(Base):
    def setup(self, trainer, pl_module, stage):
        if trainer.fast_dev_run:
            raise RuntimeError("no")


class RefusesBarebones(Base):
    def setup(self, trainer, pl_module, stage):
        if trainer.barebones:
            raise RuntimeError("no")


class ChangesWeights(Base):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.head.bias.add_(1e-6)


class DrawsTorch(Base):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(())


class DrawsPython(Base):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        random.random()  # noqa: S311 -- a draw, not a secret


class LeavesSubmodule(Base):
    def on_fit_start(self, trainer, pl_module):
        pl_module.my_metric = torch.nn.Identity()


class LeavesForward(Base):
    def on_fit_start(self, trainer, pl_module):
        forward = pl_module.head.forward
        pl_module.head.forward = functools.partial(forward)


class LeavesGradientHook(Base):
    def on_fit_start(self, trainer, pl_module):
        pl_module.head.bias.register_hook(lambda gradient: gradient)


class LeavesStepHook(Base):
    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: None)


class LeavesWrappedSave(Base):
    def on_fit_start(self, trainer, pl_module):
        save = trainer.strategy.save_checkpoint
        trainer.strategy.save_checkpoint = functools.partial(save)


class LeavesFrozen(Base):
    def on_train_end(self, trainer, pl_module):
        pl_module.head.bias.requires_grad_(False)


class LeavesDeterminism(Base):
    def on_train_end(self, trainer, pl_module):
        torch.use_deterministic_algorithms(True)


class SyncsItem(Base):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        outputs["loss"].item()


class SyncsBool(Base):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if torch.isnan(outputs["loss"]):
            raise RuntimeError


class SyncsCpu(Base):
    def on_after_backward(self, trainer, pl_module):
        pl_module.head.bias.grad.to("cpu")


class NeedsTeardown(Base):
    """Lightning calls no `teardown` after an exception."""

    def on_fit_start(self, trainer, pl_module):
        self.handle = pl_module.register_forward_pre_hook(lambda *_: None)

    def teardown(self, trainer, pl_module, stage):
        if stage == "fit":
            self.handle.remove()


class ForgetsWeights(Base):
    """Validates with other weights, and forgets the trained ones if validation fails."""

    def on_validation_start(self, trainer, pl_module):
        self.held = pl_module.head.bias.detach().clone()
        pl_module.head.bias.data.zero_()

    def on_validation_end(self, trainer, pl_module):
        pl_module.head.bias.data.copy_(self.held)


class HidesException(Base):
    def on_exception(self, trainer, pl_module, exception):
        raise KeyError("mine")


class StatePath(Base):
    def state_dict(self):
        return {"path": Path("somewhere")}

    def load_state_dict(self, state_dict):
        pass


class CheckpointObject(Base):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["mine"] = SimpleNamespace()


class LoadsHalf(Base):
    def __init__(self):
        super().__init__()
        self.other = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count, self.other = self.count + 1, self.other + 1

    def state_dict(self):
        return {"count": self.count, "other": self.other}


class ForgetsOnFitStart(Base):
    def on_train_start(self, trainer, pl_module):
        self.count = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1


class ForgetsMomentum(Base):
    """Its influence on the weights depends on something that it does not save."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scale *= 0.9

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.head.bias.grad.mul_(self.scale)


class CountsSanityCheck(Base):
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, n=0):
        self.count += 1


@callback_registry.register
class FaultyConfig(CallbackConfigBase):
    """Makes a broken callback."""

    name: Literal["conformance_faulty"] = "conformance_faulty"
    fault: str = "Base"
    """The class."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.fault == "TwoOfAKind":
            return [Base(), Base()]
        if self.fault == "SameAgain":
            return [ONE]
        if self.fault == "NoCallback":
            return [object()]
        return [globals()[self.fault]()]


ONE = Base()


class Faulty(CallbackConformance):
    """Not collected: its clauses are called by hand."""

    def __init__(self, config: CallbackConfigBase, **options: Any) -> None:
        self.__dict__.update(config=config, **options)


IN_RUNS = [
    ("SharesDict", "makes_fresh_callbacks", r"share .*\.cache"),
    ("SharesHelper", "makes_fresh_callbacks", r"share .*\.helper\.seen"),
    ("SameAgain", "makes_fresh_callbacks", "share"),
    ("NoCallback", "makes_fresh_callbacks", "a lightning.pytorch Callback is expected"),
    ("UnstableKey", "has_unique_and_stable_state_keys", "Derive the key"),
    ("TwoOfAKind", "has_unique_and_stable_state_keys", "Give each its own"),
    ("Unpicklable", "callbacks_can_be_pickled", "lambda"),
    ("NeedsPlainTrainer", "fits_on_our_trainer", "not my trainer"),
    ("NeedsOurTrainer", "fits_on_a_plain_trainer", "config"),
    ("StopsEarly", "fits_on_a_plain_trainer", "took 1 optimizer steps, not 8"),
    ("NeedsLogger", "fits_without_loggers", "log_dir"),
    ("HooksPileUp", "fits_twice", r"body\._forward_hooks: 2 instead of 1"),
    ("OnlyOnce", "fits_twice", "used before"),
    ("NeedsAStepEachBatch", "fits_while_accumulating", "no step in this batch"),
    ("NeedsOneOptimizer", "fits_with_manual_optimization", "param_groups"),
    ("RefusesFastDevRun", "runs_in_fast_dev_run", "no"),
    ("ChangesWeights", "leaves_training_alone", "changes what is trained"),
    ("DrawsTorch", "leaves_training_alone", "global random generator of torch"),
    ("DrawsPython", "leaves_training_alone", "global random generator of random"),
    ("HooksPileUp", "leaves_training_alone", r"body\._forward_hooks: 1 instead of 0"),
    ("LeavesSubmodule", "leaves_training_alone", "my_metric"),
    ("LeavesForward", "leaves_training_alone", r"head\.forward"),
    ("LeavesGradientHook", "leaves_training_alone", r"head\.bias\._backward_hooks"),
    ("LeavesStepHook", "leaves_training_alone", r"optimizers\[0\]\._optimizer_step_post_hooks"),
    ("LeavesWrappedSave", "leaves_training_alone", r"trainer\.strategy\.save_checkpoint"),
    ("LeavesFrozen", "leaves_training_alone", r"head\.bias\.requires_grad: False"),
    ("LeavesDeterminism", "leaves_training_alone", "deterministic algorithms: True"),
    ("SyncsItem", "adds_no_host_sync", "_local_scalar_dense"),
    ("SyncsBool", "adds_no_host_sync", "_local_scalar_dense"),
    ("SyncsCpu", "adds_no_host_sync", "'to': 1"),
    ("NeedsTeardown", "exception_in_training_step_leaves_no_trace", "_forward_pre_hooks"),
    ("ForgetsWeights", "exception_in_validation_step_leaves_no_trace", "other weights"),
    ("ForgetsWeights", "exception_in_sanity_check_leaves_no_trace", "other weights"),
    ("HidesException", "exception_in_training_step_leaves_no_trace", "KeyError.*surfaces"),
    ("HidesException", "exception_in_validation_step_leaves_no_trace", "KeyError.*surfaces"),
    ("StatePath", "state_is_plain_data_and_restored", "weights_only=True"),
    ("CheckpointObject", "state_is_plain_data_and_restored", "weights_only=True"),
    ("LoadsHalf", "state_is_plain_data_and_restored", "restore all of it"),
    (
        "ForgetsOnFitStart",
        "resumes_as_if_never_interrupted",
        r"\['callbacks'\].*\['count'\] is 4 instead of 8",
    ),
    ("ForgetsMomentum", "resumes_as_if_never_interrupted", r"\['optimizer_states'\]"),
    ("CountsSanityCheck", "sanity_check_does_not_count", "ignore what happens"),
]


@pytest.fixture(autouse=True)
def _put_back():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("fault", "clause", "says"), IN_RUNS)
def test_a_broken_callback_is_rejected(fault: str, clause: str, says: str, tmp_path: Path):
    """The clause fails, by its own message or by the callback's own exception."""
    with pytest.raises(Exception, match=says):
        getattr(Faulty(FaultyConfig(fault=fault)), f"test_{clause}")(tmp_path)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_callback_that_knows_only_fit_is_rejected(stage: str, tmp_path: Path):
    """Stages without training run the callbacks too."""
    with pytest.raises(RuntimeError, match="what is"):
        Faulty(FaultyConfig(fault="NeedsFit")).test_runs_every_stage(stage, tmp_path)


def test_barebones_rejects_only_what_asks_to_be_kept(tmp_path: Path):
    """A callback that fails in barebones mode may be left out of it, not kept in it."""
    Faulty(FaultyConfig(fault="RefusesBarebones")).test_runs_in_barebones_mode(tmp_path)
    kept = CallbackMetadataConfig(enabled_for_barebones=True)
    config = FaultyConfig(fault="RefusesBarebones", metadata=kept)

    with pytest.raises(RuntimeError, match="no"):
        Faulty(config).test_runs_in_barebones_mode(tmp_path)


def test_manual_optimization_may_be_refused_only_with_our_error(tmp_path: Path):
    """A callback that declares that it does not support it must say so itself."""
    faulty = Faulty(FaultyConfig(fault="NeedsOneOptimizer"), supports_manual_optimization=False)
    with pytest.raises(AttributeError, match="param_groups"):
        faulty.test_fits_with_manual_optimization(tmp_path)


def test_a_callback_that_trains_too_short_to_resume_is_told_so(tmp_path: Path):
    """A clause that could compare nothing fails instead of passing."""
    faulty = Faulty(FaultyConfig(fault="StopsEarly"), changes_training=True)
    with pytest.raises(BrokenPromiseError, match="trains two epochs"):
        faulty.test_resumes_as_if_never_interrupted(tmp_path)


def test_declared_influence_on_training_is_accepted(tmp_path: Path):
    """`changes_training` allows other weights, and nothing else."""
    changes = Faulty(FaultyConfig(fault="ChangesWeights"), changes_training=True)
    changes.test_leaves_training_alone(tmp_path / "a")
    leaves = Faulty(FaultyConfig(fault="HooksPileUp"), changes_training=True)

    with pytest.raises(BrokenPromiseError, match="leaves behind"):
        leaves.test_leaves_training_alone(tmp_path / "b")


def test_every_clause_has_a_planted_fault():
    """A clause without a fault that it rejects would not be tested."""
    clauses = {n.removeprefix("test_") for n in dir(CallbackConformance) if n.startswith("test_")}
    elsewhere = {  # here above, or in test_config_faults.py
        "config_module_is_light",
        "documents_every_field",
        "is_found_by_its_name",
        "refuses_unknown_options",
        "runs_every_stage",
        "runs_in_barebones_mode",
        "survives_json",
        "survives_pickle_and_deepcopy",
        "survives_yaml",
    }
    assert clauses == {clause for _, clause, _ in IN_RUNS} | elsewhere
