from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import nshtrainer
from nshtrainer import TrainerConfig, create_callbacks

NAMES = [
    "debug_flag",
    "epoch_timer",
    "finite_checks",
    "learning_rate_monitor",
    "log_epoch",
    {"name": "metric_validation", "metrics": ["val/loss"]},
    {"name": "norm_logging", "log_grad_norm": True, "log_param_norm_per_param": 2},
    "print_table_metrics",
]


@pytest.mark.parametrize("reverse", [False, True])
def test_all_at_once_on_a_plain_trainer(net, make_trainer, memory_logger, reverse, capsys):
    """Every callback does its work beside the others, whatever their order, in a second fit too."""
    logger = memory_logger()
    callbacks = create_callbacks(NAMES[::-1] if reverse else NAMES)
    trainer = make_trainer(*callbacks, logger=logger, num_sanity_val_steps=1)
    before = list(trainer.callbacks)

    trainer.fit(net())
    first = {name for _, metrics in logger.calls for name in metrics}
    logger.calls.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net())
    second = {name for _, metrics in logger.calls for name in metrics}

    expected = {"train/epoch_time_s", "val/epoch_time_s", "lr-SGD", "computed_epoch"}
    expected |= {"train/grad_norm", "train/param_2.0_norm/first.bias", "train/loss", "val/loss"}
    assert expected <= first == second
    assert trainer.callbacks == before
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_one_call_per_logging_step(net, make_trainer, memory_logger):
    """Learning rate, norms and epoch of one step reach a logger together, at the module's x-axis."""
    logger = memory_logger()
    trainer = make_trainer(*create_callbacks(NAMES[3:7]), logger=logger, limit_val_batches=0)

    trainer.fit(net())

    for step in range(6):
        ours = [m for s, m in logger.calls if s == step and "train/grad_norm" in m]
        assert len(ours) == 1
        assert {"lr-SGD", "computed_epoch", "train/grad_norm"} <= set(ours[0])


def test_several_real_loggers(net, make_trainer, tmp_path):
    """Two CSV loggers get the same rows."""
    loggers = [CSVLogger(tmp_path, name=name) for name in ("a", "b")]

    make_trainer(*create_callbacks(NAMES), logger=loggers).fit(net())

    files = [(tmp_path / name / "version_0" / "metrics.csv").read_text() for name in ("a", "b")]
    assert files[0] == files[1]
    assert "train/grad_norm" in files[0].splitlines()[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_an_exception_leaves_nothing_behind(net, make_trainer, reverse):
    """After a crash the trainer has its callbacks and the optimizer no hooks; a new fit works."""

    class Crash(net):
        crash = True

        def on_train_batch_end(self, *args):
            if self.crash and self.global_step == 2:
                raise ZeroDivisionError

    module = Crash()
    trainer = make_trainer(*create_callbacks(NAMES[::-1] if reverse else NAMES))
    before = list(trainer.callbacks)

    with pytest.raises(ZeroDivisionError):
        trainer.fit(module)
    assert trainer.callbacks == before
    module.crash = False
    trainer.fit(module)
    assert trainer.state.finished


def test_callbacks_can_be_copied(net, make_trainer):
    """Callbacks survive copying and pickling after a fit, as spawned processes need."""
    callbacks = create_callbacks(NAMES)
    make_trainer(*callbacks).fit(net())

    for copied in (copy.deepcopy(callbacks), pickle.loads(pickle.dumps(callbacks))):
        make_trainer(*copied).fit(net())


def test_no_callback_changes_the_training(net, make_trainer):
    """Weights after a run with everything are bitwise those of a run without."""
    states = []
    for callbacks in ([], create_callbacks(NAMES)):
        module = net()
        make_trainer(*callbacks, max_epochs=2, num_sanity_val_steps=1).fit(module)
        states.append(module.state_dict())

    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_is_plain_data(net, make_trainer, save_at, tmp_path):
    """A checkpoint with the state of all callbacks loads where only plain data is allowed."""
    path = tmp_path / "x.ckpt"
    make_trainer(*create_callbacks(NAMES), save_at(3, path)).fit(net())

    state = torch.load(path, weights_only=True)["callbacks"]

    assert {"nshtrainer.epoch_timer", "nshtrainer.log_epoch"} <= set(state)


def test_slots_and_defaults_of_our_trainer(net, tmp_path, caplog):
    """Our Trainer takes them from its slots; a slot and the same callback in the list is one."""
    config = TrainerConfig.model_validate(
        {
            "directory": {"project_root": tmp_path},
            "loggers": [],
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_norms": {"log_grad_norm": "inf"},
            "auto_validate_metrics": {"metrics": ["val/loss"]},
            "callbacks": [{"name": "debug_flag"}, {"name": "epoch_timer"}],
        }
    )
    with caplog.at_level(logging.INFO):
        trainer = nshtrainer.Trainer(config)
    names = [c.state_key for c in trainer.callbacks if c.state_key.startswith("nshtrainer.")]
    assert names.count("nshtrainer.debug_flag") == 1

    trainer.fit(net())

    assert trainer.debug is False
    assert {"lr-SGD", "computed_epoch", "train/grad_norm", "train/epoch_time_s"} <= set(
        trainer.callback_metrics
    )
