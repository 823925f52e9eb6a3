from __future__ import annotations

import pytest
from lightning.pytorch import Callback

from nshtrainer_monitoring import DebugFlagCallback


class Spy(Callback):
    def __init__(self):
        self.seen = {}

    def on_sanity_check_start(self, trainer, pl_module):
        self.seen["sanity"] = getattr(trainer, "debug", "absent")

    def on_train_start(self, trainer, pl_module):
        self.seen["train"] = getattr(trainer, "debug", "absent")


def test_set_only_during_the_sanity_check(net, make_trainer):
    """The flag is True in the sanity check; a plain trainer has none before and after."""
    spy = Spy()
    trainer = make_trainer(DebugFlagCallback(), spy, num_sanity_val_steps=1)

    trainer.fit(net())

    assert spy.seen == {"sanity": True, "train": "absent"}
    assert not hasattr(trainer, "debug")


@pytest.mark.parametrize("before", [True, False])
def test_the_flag_is_given_back_as_it_was(net, make_trainer, before):
    """A flag that someone set stays what it was."""
    spy = Spy()
    trainer = make_trainer(DebugFlagCallback(), spy, num_sanity_val_steps=1)
    trainer.debug = before

    trainer.fit(net())

    assert spy.seen == {"sanity": True, "train": before}
    assert trainer.debug is before


def test_fast_dev_run_is_debugging(net, make_trainer):
    """In a fast_dev_run the flag is True throughout, and not for good."""
    spy = Spy()
    trainer = make_trainer(DebugFlagCallback(), spy, fast_dev_run=True)
    trainer.debug = False

    trainer.fit(net())

    assert spy.seen["train"] is True
    assert trainer.debug is False


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 1}, {"fast_dev_run": True}])
def test_an_exception_does_not_leave_it_set(net, make_trainer, options):
    """Lightning calls no teardown after an exception; the flag is restored all the same."""

    class Broken(net):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    trainer = make_trainer(DebugFlagCallback(), **options)
    trainer.debug = False

    with pytest.raises(ZeroDivisionError):
        trainer.fit(Broken())
    assert trainer.debug is False


def test_disabled_does_nothing(net, make_trainer):
    """Made by hand with enabled=False, it leaves the flag alone."""
    spy = Spy()
    trainer = make_trainer(DebugFlagCallback(enabled=False), spy, num_sanity_val_steps=1)

    trainer.fit(net())

    assert spy.seen["sanity"] == "absent"


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 1}, {"fast_dev_run": True}])
def test_ctrl_c_does_not_leave_it_set(net, make_trainer, options):
    """Lightning ends the program after Ctrl-C; a notebook goes on, with the flag as it was."""

    class Interrupted(net):
        def validation_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    trainer = make_trainer(DebugFlagCallback(), **options)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(Interrupted())
    assert not hasattr(trainer, "debug")


class BadManners(Callback):
    """Fails in `on_exception`, so that Lightning tells no callback behind it."""

    active = True

    def on_exception(self, trainer, pl_module, exception):
        if self.active:
            raise RuntimeError


def test_the_next_run_restores_what_another_callback_prevented(net, make_trainer):
    """A flag that stayed set since another callback failed in between is not taken for the user's."""

    class Broken(net):
        broken = True

        def validation_step(self, batch, batch_idx):
            if self.broken:
                raise ZeroDivisionError
            return super().validation_step(batch, batch_idx)

    spy, bad, module = Spy(), BadManners(), Broken()
    trainer = make_trainer(bad, DebugFlagCallback(), spy, num_sanity_val_steps=1)
    with pytest.raises(RuntimeError):
        trainer.fit(module)
    bad.active = module.broken = False
    module.train()  # the interrupted validation left it in evaluation mode

    trainer.fit(module)

    assert spy.seen == {"sanity": True, "train": "absent"}
    assert not hasattr(trainer, "debug")


def test_every_stage_of_a_fast_dev_run(net, make_trainer):
    """Validation, test and prediction of a fast_dev_run are debugging too, and end as they began."""

    class Stages(Spy):
        def on_validation_start(self, trainer, pl_module):
            self.seen["val"] = trainer.debug

        def on_test_start(self, trainer, pl_module):
            self.seen["test"] = trainer.debug

        def on_predict_start(self, trainer, pl_module):
            self.seen["predict"] = trainer.debug

    spy, module = Stages(), net()
    trainer = make_trainer(DebugFlagCallback(), spy, fast_dev_run=True)

    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    trainer.predict(module)

    assert spy.seen == {"val": True, "test": True, "predict": True}
    assert not hasattr(trainer, "debug")
