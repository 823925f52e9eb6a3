from __future__ import annotations

import math

import pytest

from nshtrainer_monitoring import LogEpochCallback
from nshtrainer_monitoring.log_epoch.progress import epoch_fraction

NAME = "computed_epoch"


def numbers(logger, name=NAME):
    return [round(float(value), 6) for _, value in logger.values(name)]


def test_fraction_is_complete_epochs_and_a_part():
    """The closed form, with a length, without one, and past the end."""
    assert epoch_fraction(2, 3, 4) == 2.75
    assert epoch_fraction(2, 3, math.inf) == 2.0
    assert epoch_fraction(2, 9, 4) == 3.0
    assert epoch_fraction(0, 0, 0) == 0.0


def test_accumulation_does_not_change_the_epoch(net, make_trainer, memory_logger):
    """With accumulation 4 of 6 batches, steps are after 4 and 6 batches, not 1 and 2 sixths."""
    logger = memory_logger()
    trainer = make_trainer(
        LogEpochCallback(val=False), logger=logger, accumulate_grad_batches=4, max_epochs=2
    )

    trainer.fit(net())

    expected = [4 / 6, 1.0, 1.0, 1 + 4 / 6, 2.0, 2.0]  # each epoch ends with a value of its own
    assert numbers(logger) == [round(value, 6) for value in expected]


def test_several_optimizers_do_not_change_the_epoch(net, make_trainer, memory_logger):
    """Two optimizers step per batch; the epoch counts batches."""
    logger = memory_logger()
    trainer = make_trainer(LogEpochCallback(val=False), logger=logger)

    trainer.fit(net(optimizers=2, batches=4))

    assert numbers(logger) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_validation_shows_how_far_training_is(net, make_trainer, memory_logger):
    """A validation in the middle of epoch 1 logs 0.5, whatever the number of its own batches."""
    logger = memory_logger()
    trainer = make_trainer(
        LogEpochCallback(train=False), logger=logger, val_check_interval=0.5, num_sanity_val_steps=1
    )

    trainer.fit(net())

    assert numbers(logger) == [0.5, 1.0]


def test_a_test_shows_how_long_was_trained(net, make_trainer, memory_logger):
    """After a fit that stopped in the middle of an epoch, validate and test log that fraction."""
    logger = memory_logger()
    trainer = make_trainer(LogEpochCallback(), max_steps=9, max_epochs=-1)
    module = net()
    trainer.fit(module)
    trainer.logger = logger

    trainer.test(module, verbose=False)
    trainer.validate(module, verbose=False)

    assert numbers(logger) == [1.5, 1.5]


def test_an_unknown_length_is_learned(net, make_trainer, memory_logger):
    """Without a length whole epochs are logged until one is complete, then fractions, unwarned."""
    logger = memory_logger()
    trainer = make_trainer(LogEpochCallback(val=False), logger=logger, max_epochs=3)

    trainer.fit(net(length_known=False, batches=2))

    assert numbers(logger) == [0, 0, 1, 1.5, 2, 2, 2.5, 3, 3]


def test_a_limit_above_the_data_is_not_the_length(net, make_trainer, memory_logger):
    """A stream of 2 batches that is limited to 8 is known to have 2 after its first epoch."""
    logger = memory_logger()
    trainer = make_trainer(
        LogEpochCallback(val=False), logger=logger, max_epochs=2, limit_train_batches=8
    )

    trainer.fit(net(length_known=False, batches=2))

    assert numbers(logger) == [0.125, 0.25, 1, 1.5, 2, 2]


def test_an_epoch_that_was_cut_teaches_nothing(net, make_trainer, memory_logger):
    """Only a whole epoch tells its length; one that `max_steps` ended in the middle does not."""
    callback = LogEpochCallback()
    trainer = make_trainer(callback, max_steps=1, max_epochs=-1)

    trainer.fit(net(length_known=False, batches=2))

    assert callback.state_dict()["batches_per_epoch"] is None


@pytest.mark.parametrize(
    ("saved_at", "epochs", "expected"),
    [
        (1, 3, [0, 0, 1, 1, 1, 2, 2.5, 3, 3]),  # nothing is known until epoch 1 is complete
        (3, 3, [2, 2, 2, 2.5, 3, 3]),  # known from epoch 0
    ],
)
def test_what_was_learned_is_resumed(
    net, make_trainer, memory_logger, save_at, tmp_path, saved_at, epochs, expected
):
    """The length is in the checkpoint; a stream that began anew in its middle teaches no wrong one."""
    path = tmp_path / "middle.ckpt"
    module = net(length_known=False, batches=2)
    make_trainer(LogEpochCallback(), save_at(saved_at, path), max_epochs=2).fit(module)

    logger = memory_logger()
    callback = LogEpochCallback(val=False)
    trainer = make_trainer(callback, logger=logger, max_epochs=epochs)
    trainer.fit(net(length_known=False, batches=2), ckpt_path=path)

    assert numbers(logger) == expected
    assert callback.state_dict()["batches_per_epoch"] == 2


def test_only_logging_steps_are_logged(net, make_trainer, memory_logger):
    """The x-axis and the rhythm are those of the module's own metrics."""
    logger = memory_logger()
    trainer = make_trainer(LogEpochCallback(val=False), logger=logger, log_every_n_steps=3)

    trainer.fit(net())

    own = [step for step, _ in logger.values("train/loss")]
    assert [step for step, _ in logger.values(NAME)][: len(own)] == own == [2, 5]


def test_available_without_loggers(net, make_trainer):
    """Tables and checkpoint names see the epoch also where nothing is logged to."""
    trainer = make_trainer(LogEpochCallback(metric_name="e"))

    trainer.fit(net())

    assert trainer.callback_metrics["e"].item() == 1.0


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_resume_goes_on_where_it_was(net, make_trainer, memory_logger, save_at, tmp_path):
    """A run resumed in the middle of an epoch logs the same fractions as an uninterrupted one."""
    path = tmp_path / "middle.ckpt"

    def fit(*others, **options):
        logger = memory_logger()
        callback = LogEpochCallback(val=False)
        make_trainer(callback, *others, logger=logger, max_epochs=2).fit(net(), **options)
        return numbers(logger)

    whole = fit(save_at(8, path))
    resumed = fit(ckpt_path=path)

    assert resumed[0] == 1.5
    assert resumed == whole[-len(resumed) :]
