from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from nshtrainer.runtime.driver import RuntimeCallback, attach, find_driver
from nshtrainer.runtime.events import emit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 with torch 2.15
]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.arange(12.0).reshape(4, 3), batch_size=2)


def make_trainer(*callbacks, **options):
    options = {"enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=list(callbacks),
        **options,
    )


class Listener(Callback):
    def __init__(self):
        self.heard = []

    def on_optimizer_step_skipped(self, trainer, pl_module, count, reasons):
        self.heard.append((count, reasons))

    def on_checkpoint_prepare(self, trainer, pl_module, checkpoint, weights_only):
        self.heard.append("prepare")


class Broken(Callback):
    def on_optimizer_step_skipped(self, trainer, pl_module, count, reasons):
        raise KeyError("no such counter")

    def on_checkpoint_prepare(self, trainer, pl_module, checkpoint, weights_only):
        raise KeyError("no weights")


def fitted(*callbacks):
    trainer = make_trainer(*callbacks)
    trainer.fit(Module())
    return trainer


def test_one_failing_listener_does_not_silence_the_others(caplog):
    """A notification reaches every listener; the failure is logged with the callback's name."""
    listener = Listener()
    trainer = fitted(Broken(), Callback(), listener)

    with caplog.at_level(logging.ERROR):
        emit(trainer, "on_optimizer_step_skipped", 2, ("too large",))

    assert listener.heard == [(2, ("too large",))]
    assert "Broken.on_optimizer_step_skipped failed" in caplog.text


def test_failing_preparation_stops_the_save_and_names_the_callback(caplog):
    """What a prepare listener raises reaches the caller as it was, naming the callback."""
    listener = Listener()
    trainer = fitted(Broken(), listener)

    with pytest.raises(KeyError, match="no weights") as caught:
        emit(trainer, "on_checkpoint_prepare", {}, False)

    told = caplog.text + "".join(getattr(caught.value, "__notes__", []))
    assert "Broken.on_checkpoint_prepare" in told
    assert listener.heard == []


class Family(Callback):
    """A family's callback: attaches in setup, and remembers what it saw."""

    def __init__(self, failing=False):
        self.failing = failing
        self.order = []
        self.drivers = []

    def setup(self, trainer, pl_module, stage):
        driver = attach(trainer, "test")
        self.drivers.append(driver)
        driver.gradients.register(f"test{id(self)}", outcome=lambda step, skipped: None)

    def on_train_start(self, trainer, pl_module):
        self.order = [type(callback).__name__ for callback in trainer.callbacks]

    def on_train_batch_end(self, trainer, *args):
        if self.failing:
            raise RuntimeError("on purpose")


def hooks_of(trainer):
    optimizer = trainer.optimizers[0]
    return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


class HookSpy(Callback):
    """Keeps the optimizer, which a finished trainer may drop."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.optimizer = trainer.optimizers[0]
        self.during = hooks_of(trainer)

    def after(self):
        optimizer = self.optimizer
        return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


def test_driver_sits_before_checkpoints_and_leaves_the_callers_list_alone(tmp_path):
    """One driver per trainer, after other callbacks and before checkpoints; gone afterwards."""
    first, second, spy = Family(), Family(), HookSpy()
    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(checkpoint, first, second, spy, enable_checkpointing=True)
    callers = trainer.callbacks
    before = list(callers)
    trainer.fit(Module())

    names = [n for n in first.order if n in {"Family", "RuntimeCallback", "ModelCheckpoint"}]
    assert names == ["Family", "Family", "RuntimeCallback", "ModelCheckpoint"]
    assert first.drivers[0] is second.drivers[0]
    assert callers == before
    assert trainer.callbacks == before
    assert spy.during
    assert spy.after() == []


def test_exception_leaves_no_hooks_behind_and_the_next_fit_works():
    """After an exception the optimizer has no hooks and the trainer no driver; a new fit is fine."""
    family, spy = Family(failing=True), HookSpy()
    trainer = make_trainer(family, spy)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Module())

    assert spy.during
    assert spy.after() == []
    assert find_driver(trainer) is None

    family.failing = False
    trainer.fit(Module())

    assert len(family.drivers) == 2
    assert family.drivers[0] is not family.drivers[1]
    assert spy.after() == []


def test_one_callback_serves_two_trainers():
    """Each trainer has a driver of its own."""
    family = Family()
    for _ in range(2):
        make_trainer(family).fit(Module())

    assert family.drivers[0] is not family.drivers[1]


def test_driver_without_clients_has_no_hot_hooks():
    """Lightning skips what is not callable, so a driver nobody uses costs nothing per batch."""
    driver = RuntimeCallback()
    idle = (driver.on_train_batch_end, driver.on_before_optimizer_step, driver.on_after_backward)
    driver.gradients.register("a", outcome=lambda step, skipped: None)
    busy = (driver.on_train_batch_end, driver.on_before_optimizer_step, driver.on_after_backward)
    driver.gradients.unregister("a")

    assert idle == (None, None, None)
    assert [callable(hook) for hook in busy] == [True, True, False]
    assert driver.on_train_batch_end is None


class Copier(Callback):
    """Copies the driver in the middle of a run, when it has clients, hooks and tensors."""

    def on_train_batch_end(self, trainer, *args):
        driver = find_driver(trainer)
        assert driver is not None
        self.copies = [copy.deepcopy(driver), pickle.loads(pickle.dumps(driver))]


def test_a_copied_driver_starts_as_new():
    """Pickle and deepcopy work in mid-run (ddp_spawn); the copy has no clients, and takes new ones."""
    copier = Copier()
    make_trainer(Family(), copier).fit(Module())

    for copied in copier.copies:
        assert copied.state_key == "nshtrainer.runtime"
        assert copied.state_dict() == {}
        assert copied.on_before_optimizer_step is None
        copied.gradients.register("a", outcome=lambda step, skipped: None)
        assert callable(copied.on_before_optimizer_step)


class Preparer(Callback):
    """Asks for prepared saves and marks each file."""

    def setup(self, trainer, pl_module, stage):
        attach(trainer, "test").enable_saving(trainer)

    def on_checkpoint_prepare(self, trainer, pl_module, checkpoint, weights_only):
        checkpoint["marked"] = True


class SavesOnException(ModelCheckpoint):
    """A checkpoint callback of the kind that comes after all others."""

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.dirpath + "/exception.ckpt")


def test_saves_are_prepared_up_to_the_last_checkpoint_after_an_exception(tmp_path):
    """Checkpoints written in on_exception are prepared too; later saves of the trainer are not."""
    trainer = make_trainer(
        Preparer(),
        Family(failing=True),
        SavesOnException(dirpath=tmp_path),
        enable_checkpointing=True,
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "later.ckpt")

    assert torch.load(tmp_path / "exception.ckpt", weights_only=True)["marked"]
    assert "marked" not in torch.load(tmp_path / "later.ckpt", weights_only=True)
