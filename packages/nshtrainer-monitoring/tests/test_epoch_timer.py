from __future__ import annotations

import logging
import time

import pytest
import torch

from nshtrainer_monitoring import EpochTimerCallback
from nshtrainer_monitoring.epoch_timer.clock import Clock


def test_clock_counts_only_while_it_runs():
    """Pausing keeps what was counted, running twice counts once, a reset starts from a number."""
    times = iter([10.0, 12.0, 20.0, 21.0, 50.0, 53.0])
    clock = Clock(lambda: next(times))

    clock.run()  # at 10
    clock.run()
    clock.pause()  # at 12
    assert clock.elapsed == 2.0
    clock.run()  # at 20
    assert clock.elapsed == 3.0
    clock.reset(100.0)
    clock.run()  # at 50
    assert clock.elapsed == 103.0


def test_every_stage_is_logged(net, make_trainer, memory_logger, caplog):
    """Durations are metrics, one per epoch, and one line for a person."""
    caplog.set_level(logging.INFO, "nshtrainer_monitoring")
    logger = memory_logger()
    trainer = make_trainer(EpochTimerCallback(), logger=logger, max_epochs=2)
    module = net()

    trainer.fit(module)
    trainer.test(module, verbose=False)
    trainer.predict(module)

    counts = {"train": 2, "val": 2, "test": 1, "predict": 1}
    for stage, count in counts.items():
        values = [v for _, v in logger.values(f"{stage}/epoch_time_s")]
        assert len(values) == count
        assert all(v > 0 for v in values)
        assert len([r for r in caplog.records if r.message.startswith(f"{stage} epoch")]) == count
    assert trainer.callback_metrics["predict/epoch_time_s"] > 0


def test_validation_is_not_training_time(net, make_trainer, memory_logger):
    """A validation in the middle of an epoch counts for val only; together they fit in the run."""
    logger = memory_logger()
    trainer = make_trainer(EpochTimerCallback(), logger=logger, val_check_interval=0.5)

    class Slow(net):
        def validation_step(self, batch, batch_idx):
            busy = time.monotonic() + 0.15
            while time.monotonic() < busy:
                pass

    start = time.monotonic()
    trainer.fit(Slow())
    whole = time.monotonic() - start

    val = sum(v for _, v in logger.values("val/epoch_time_s"))
    (train,) = (v for _, v in logger.values("train/epoch_time_s"))
    assert val >= 4 * 0.15
    assert train + val <= whole


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_survives_a_resume_in_the_middle_of_an_epoch(
    net, make_trainer, memory_logger, save_at, tmp_path
):
    """The seconds of the interrupted part are in the checkpoint and in the epoch's duration."""
    path = tmp_path / "middle.ckpt"
    make_trainer(EpochTimerCallback(), save_at(2, path)).fit(net())
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["nshtrainer.epoch_timer"]
    assert state["train_elapsed_s"] > 0
    state["train_elapsed_s"] = 1000.0
    torch.save(checkpoint, path)

    logger = memory_logger()
    make_trainer(EpochTimerCallback(), logger=logger, max_epochs=2).fit(net(), ckpt_path=path)

    first, second = (v for _, v in logger.values("train/epoch_time_s"))
    assert 1000.0 < first < 1100.0
    assert second < 100.0


def test_works_without_loggers(net, make_trainer):
    """The durations are in callback_metrics, also where nothing is logged to."""
    trainer = make_trainer(EpochTimerCallback())

    trainer.fit(net())

    assert trainer.callback_metrics["train/epoch_time_s"] > 0
