from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader

from nshtrainer_monitoring import EpochTimerCallback
from nshtrainer_monitoring.epoch_timer.clock import Clock
from nshtrainer_monitoring.epoch_timer.estimate import remaining_batches, validations_per_batch
from nshtrainer_monitoring.epoch_timer.phases import PHASES, PhaseClock
from nshtrainer_monitoring.epoch_timer.samples import samples_in
from nshtrainer_monitoring.epoch_timer.text import describe_duration, describe_shares

BUSY = 0.02


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


def busy(seconds=BUSY):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Slow(Callback):
    """Keeps the host busy in one hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda *args: busy())

    def on_before_backward(self, *args):
        """Overridden, so that a hook inside of the backward pass is looked at."""


def slow_net(net, where):
    """A module that is slow in one part of its steps."""

    def at(part):
        if where == part:
            busy()

    class SlowNet(net):
        def training_step(self, batch, batch_idx):
            at("forward")
            return super().training_step(batch, batch_idx)

        def loss(self, batch):
            loss = super().loss(batch)
            if loss.requires_grad:
                loss.register_hook(lambda gradient: at("backward"))
            return loss

        def configure_optimizers(self):
            configured = super().configure_optimizers()
            first = configured[0] if isinstance(configured, list) else configured
            first.register_step_post_hook(lambda *args: at("optimizer"))
            return configured

        def train_dataloader(self):
            def collate(samples):
                at("data")
                return torch.stack(samples)

            return DataLoader(super().train_dataloader().dataset, batch_size=2, collate_fn=collate)

        def on_train_batch_start(self, batch, batch_idx):
            at("other")

    return SlowNet


def logged_times(logger):
    """The last logged mean of each phase, without the first step, which is slow by itself."""
    return {phase: logger.values(f"train/{phase}_time_s")[-1][1] for phase in PHASES}


@pytest.mark.parametrize("optimizers", [1, 2], ids=["automatic", "manual"])
@pytest.mark.parametrize("where", ["data", "forward", "backward", "optimizer", "other"])
def test_time_counts_for_the_part_it_is_spent_in(
    net, make_trainer, memory_logger, where, optimizers
):
    """Each part of a step is seen where it is, and all of them add up to the time of a batch."""
    logger = memory_logger()
    trainer = make_trainer(EpochTimerCallback(), logger=logger, limit_val_batches=0)

    trainer.fit(slow_net(net, where)(optimizers=optimizers))

    times = logged_times(logger)
    assert times.pop(where) >= BUSY
    assert max(times.values()) < BUSY
    for (_, whole), *parts in zip(
        logger.values("train/batch_time_s"),
        *(logger.values(f"train/{phase}_time_s") for phase in PHASES),
        strict=True,
    ):
        assert whole == pytest.approx(sum(part for _, part in parts))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    ],
)
def test_callbacks_count_for_themselves(net, make_trainer, memory_logger, hook, reverse):
    """What other callbacks take is not taken for a part of the step, before or behind the timer."""
    logger = memory_logger()
    callbacks = [EpochTimerCallback(), Slow(hook)]
    trainer = make_trainer(
        *(reversed(callbacks) if reverse else callbacks), logger=logger, limit_val_batches=0
    )

    trainer.fit(net())

    times = logged_times(logger)
    assert times.pop("callbacks") >= BUSY
    assert max(times.values()) < BUSY


def test_closures_that_run_again_count_as_they_should(net, make_trainer, memory_logger):
    """LBFGS computes forward and backward several times inside its step; the step is what is left."""

    def configure(module):
        return torch.optim.LBFGS(module.parameters(), max_iter=3, line_search_fn=None)

    class Closure(slow_net(net, "forward")):
        pass

    logger = memory_logger()
    trainer = make_trainer(EpochTimerCallback(), logger=logger, limit_val_batches=0)

    trainer.fit(Closure(configure=configure))

    times = logged_times(logger)
    assert times["forward"] >= BUSY
    assert times["optimizer"] < BUSY


def test_checkpoints_after_a_validation_count_as_callbacks(net, make_trainer, memory_logger):
    """What is done in on_validation_end is neither validation nor a part of the next step."""
    logger = memory_logger()
    trainer = make_trainer(
        EpochTimerCallback(), Slow("on_validation_end"), logger=logger, val_check_interval=5
    )

    trainer.fit(net())

    times = logged_times(logger)
    assert times["callbacks"] >= BUSY
    assert max(times["data"], times["other"]) < BUSY


def test_validation_is_no_part_of_a_step(net, make_trainer, memory_logger):
    """A slow validation in the middle of an interval changes neither its means nor its throughput."""

    class SlowValidation(net):
        def validation_step(self, batch, batch_idx):
            busy(0.2)

    logger = memory_logger()
    trainer = make_trainer(
        EpochTimerCallback(), logger=logger, val_check_interval=4, log_every_n_steps=3
    )

    trainer.fit(SlowValidation())

    (_, before), (_, after) = logger.values("train/batch_time_s")
    assert max(before, after) < 0.1


def test_phases_lie_inside_one_another():
    """Every second counts once; a lap begins where the last ended, a total where it was reset."""
    times = itertools.count()
    clock = PhaseClock(lambda: float(next(times)))

    clock.enter("optimizer")  # at 0
    before = clock.enter("forward")  # at 1
    clock.enter(before)  # at 2
    clock.enter(None)  # at 3
    clock.enter("data")  # at 4

    assert clock.lap() == dict.fromkeys(PHASES, 0.0) | {"optimizer": 2, "forward": 1, "data": 1}
    assert clock.lap() == dict.fromkeys(PHASES, 0.0) | {"data": 1}
    clock.reset({"data": 100.0})  # at 7
    assert clock.total() == dict.fromkeys(PHASES, 0.0) | {"data": 101}
    assert clock.lap() == dict.fromkeys(PHASES, 0.0) | {"data": 3}


def test_the_device_is_waited_for_only_if_asked():
    """`synchronize_device` waits at each boundary, before the clock is read; a CPU needs no waiting.

    Looked at from inside, since there may be no such device here.
    """
    asked, not_asked = EpochTimerCallback(synchronize_device=True), EpochTimerCallback()
    order = []
    clock = PhaseClock(lambda: order.append("read") or 0.0, settle=lambda: order.append("wait"))

    clock.enter("forward")

    assert order == ["wait", "read"]
    assert asked._waiting_for(torch.device("cuda", 0)) is torch.cuda.synchronize
    assert asked._waiting_for(torch.device("cpu")) is None
    assert not_asked._waiting_for(torch.device("cuda", 0)) is None


def test_the_clock_is_read_a_few_times_a_step(net, make_trainer):
    """Off the logging step the timer costs some readings of a clock; counted here from inside."""
    readings = []
    timer = EpochTimerCallback()
    timer._phases = PhaseClock(lambda: readings.append(None) or 0.0)
    trainer = make_trainer(timer, log_every_n_steps=50, limit_val_batches=0)

    trainer.fit(net(batches=40))

    assert 6 * 40 <= len(readings) <= 12 * 40 + 20


@pytest.mark.parametrize(
    "options",
    [{"log_step_times": False}, {"log_throughput": False}, {"log_eta": False}],
    ids=str,
)
def test_each_kind_can_be_left_out(net, make_trainer, memory_logger, options):
    """What is switched off is not logged, the rest is."""
    names = {
        "log_step_times": {"train/batch_time_s", *(f"train/{p}_time_s" for p in PHASES)},
        "log_throughput": {"train/batches_per_s", "train/samples_per_s"},
        "log_eta": {"train/eta_s"},
    }
    logger = memory_logger()
    trainer = make_trainer(EpochTimerCallback(**options), logger=logger)

    trainer.fit(net())

    logged = {name for _, metrics in logger.calls for name in metrics}
    (left_out,) = options
    assert logged & set().union(*names.values()) == set().union(
        *(those for option, those in names.items() if option != left_out)
    )


def test_step_times_are_for_loggers(net, make_trainer, memory_logger):
    """They are not in callback_metrics, where tables and checkpoints look, but in logged_metrics."""
    trainer = make_trainer(EpochTimerCallback(), logger=memory_logger())

    trainer.fit(net())

    assert not any(name.endswith("batch_time_s") for name in trainer.callback_metrics)
    assert "train/batch_time_s" in trainer.logged_metrics


def test_throughput_counts_real_samples(net, make_trainer, memory_logger):
    """A last batch that is smaller counts as what it is: 2, 2 and 1 samples in 3 batches."""

    class Odd(net):
        def train_dataloader(self):
            return DataLoader(torch.ones(5, 3), batch_size=2)

    logger = memory_logger()
    trainer = make_trainer(EpochTimerCallback(), logger=logger, log_every_n_steps=3)

    trainer.fit(Odd())

    ((_, batches),) = logger.values("train/batches_per_s")
    ((_, samples),) = logger.values("train/samples_per_s")
    ((_, seconds),) = logger.values("train/batch_time_s")
    assert batches == pytest.approx(1 / seconds)
    assert samples / batches == pytest.approx(5 / 3)


def test_batches_without_a_tensor_have_no_samples(net, make_trainer, memory_logger):
    """Where samples cannot be counted nothing is made up, and batches are counted all the same."""

    class Named(net):
        def training_step(self, batch, batch_idx):
            return self.loss(torch.ones(2, 3))

        def train_dataloader(self):
            return DataLoader([["a", "b"]] * 2, batch_size=None)

    logger = memory_logger()
    make_trainer(EpochTimerCallback(), logger=logger).fit(Named())

    assert len(logger.values("train/batches_per_s")) == 2
    assert logger.values("train/samples_per_s") == []


@dataclasses.dataclass
class Pair:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.ones(4, 2), 4),
        (torch.tensor(1.0), 1),
        (["a", {"y": (torch.ones(3),)}], 3),
        (Pair("a", torch.ones(5, 1)), 5),
        (Pair, None),
        ("text", None),
        (None, None),
        ([], None),
    ],
)
def test_samples_are_the_rows_of_the_first_tensor(batch, samples):
    """Looked for in lists, tuples, mappings and dataclasses; None where there is no tensor."""
    assert samples_in(batch) == samples


class Foresight(Callback):
    """What is foreseen at the end of each batch, and what comes."""

    def __init__(self):
        self.remaining, self.rate = [], []
        self.batches = self.validations = 0

    def on_train_batch_end(self, trainer, *args):
        length = trainer.num_training_batches
        self.batches += 1
        self.remaining.append(remaining_batches(trainer, length))
        self.rate.append(validations_per_batch(trainer, length))

    def on_validation_end(self, trainer, pl_module):
        self.validations += not trainer.sanity_checking


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": -1, "max_steps": 9},
        {"max_epochs": 2, "max_steps": 9},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 4, "num_sanity_val_steps": 1},
    ],
    ids=str,
)
def test_the_end_is_foreseen(net, make_trainer, options):
    """At each batch the number of batches that follow is known, whatever ends the training."""
    foresight = Foresight()

    make_trainer(foresight, **options).fit(net())

    assert foresight.remaining == list(range(foresight.batches))[::-1]


def test_several_optimizers_and_accumulation_take_batches_in_proportion(net, make_trainer):
    """With `max_steps`, steps are counted in batches as they have come so far."""
    two, accumulated = Foresight(), Foresight()

    make_trainer(two, max_epochs=-1, max_steps=8).fit(net(optimizers=2))
    make_trainer(accumulated, max_epochs=-1, max_steps=3, accumulate_grad_batches=2).fit(net())

    assert two.remaining == [3, 2, 1, 0]
    assert accumulated.remaining[1::2] == [4, 2, 0]


def test_an_endless_training_has_no_end_to_foresee(net, make_trainer, memory_logger):
    """No time is made up for a training that something else will end, nor for one of unknown length."""

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    endless, unknown = memory_logger(), memory_logger()
    make_trainer(EpochTimerCallback(), Stop(), logger=endless, max_epochs=-1).fit(net())
    make_trainer(EpochTimerCallback(), logger=unknown, max_epochs=2).fit(
        net(length_known=False, batches=3)
    )

    assert endless.values("train/eta_s") == []
    assert [step for step, _ in unknown.values("train/eta_s")] == [3, 4, 5]
    assert unknown.values("train/eta_s")[-1][1] == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 0.5},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 4},
        {"val_check_interval": timedelta(hours=1)},
        {"limit_val_batches": 0},
    ],
    ids=str,
)
def test_validations_are_foreseen(net, make_trainer, options):
    """As many validations come as were foreseen for the batches of the run."""
    foresight = Foresight()

    make_trainer(foresight, max_epochs=4, **options).fit(net())

    assert foresight.rate[0] * foresight.batches == pytest.approx(foresight.validations)


def test_time_left_is_the_pace_of_what_is_left(net, make_trainer, memory_logger):
    """Slow steps and validations to come are in it; a Timer may end it earlier."""

    class Steady(net):
        def training_step(self, batch, batch_idx):
            busy(0.03)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            busy(0.03)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    free, timed = memory_logger(), memory_logger()
    timer = Timer(duration={"seconds": 1000})
    options = {"limit_train_batches": 3}
    make_trainer(EpochTimerCallback(), logger=free, max_epochs=2, **options).fit(Steady())
    make_trainer(
        EpochTimerCallback(), timer, Stop(), logger=timed, max_epochs=10**9, **options
    ).fit(Steady())

    etas = [eta for _, eta in free.values("train/eta_s")]
    fourth = 2 * 0.03 + (2 / 3) * 2 * 0.03  # two steps are left, and two thirds of a validation
    assert fourth <= etas[3] < 3 * fourth
    assert etas[-1] == 0.0
    assert all(0 < eta <= 1000 for _, eta in timed.values("train/eta_s"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12 s"),
        (59.994, "59.99 s"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_durations_are_written_for_people(seconds, text):
    """Seconds, minutes and seconds, or hours, minutes and seconds."""
    assert describe_duration(seconds) == text


def test_shares_are_written_for_people():
    """Each part as a percentage of all; nothing where nothing was measured."""
    assert describe_shares({"data": 1.0, "forward": 3.0}) == "data 25 %, forward 75 %"
    assert describe_shares({"data": 0.0}) == ""


def test_an_epoch_is_summed_up_in_a_line(net, make_trainer, caplog):
    """The line of a training epoch has throughput, the parts of its steps and the time left."""
    caplog.set_level(logging.INFO, "nshtrainer_monitoring")

    make_trainer(EpochTimerCallback(), max_epochs=2).fit(net())

    lines = [r.message for r in caplog.records if r.message.startswith("train epoch")]
    assert all("batches/s; data" in line and "optimizer" in line for line in lines)
    assert re.search(r"; \d+\.\d\d s left$", lines[0])
    assert "left" not in lines[1]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_parts_of_an_epoch_survive_a_resume(net, make_trainer, save_at, tmp_path, caplog):
    """The line of an epoch that was resumed in its middle is about all of it."""
    path = tmp_path / "middle.ckpt"
    make_trainer(EpochTimerCallback(), save_at(2, path)).fit(net())
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["nshtrainer.epoch_timer"]
    assert state["train_batches"] == 2
    assert sum(state["train_phases_s"].values()) == pytest.approx(
        state["train_elapsed_s"], rel=0.2, abs=0.01
    )
    state["train_elapsed_s"], state["train_phases_s"]["data"] = 1000.0, 1000.0
    torch.save(checkpoint, path)

    caplog.set_level(logging.INFO, "nshtrainer_monitoring")
    make_trainer(EpochTimerCallback()).fit(net(), ckpt_path=path)

    (line,) = (r.message for r in caplog.records if r.message.startswith("train epoch"))
    assert "took 16:4" in line
    assert "0.006 batches/s; data 100 %" in line


@pytest.mark.parametrize("end", ["done", "exception", "interrupt"])
def test_nothing_is_left_on_the_trainer(net, make_trainer, end):
    """Strategy, loop and callbacks are as before, with two timers too, whatever ended the training."""

    class Ends(net):
        def on_train_batch_end(self, *args):
            if end == "exception":
                raise ZeroDivisionError
            if end == "interrupt":
                raise KeyboardInterrupt

    trainer = make_trainer(EpochTimerCallback(), EpochTimerCallback(label="second"))
    loop = trainer.fit_loop.epoch_loop
    before = list(trainer.callbacks), set(vars(loop))

    if end == "done":
        trainer.fit(Ends())
    else:
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
            trainer.fit(Ends())

    assert (list(trainer.callbacks), set(vars(loop))) == before
    assert not {"training_step", "backward", "optimizer_step"} & set(vars(trainer.strategy))


def test_somebody_elses_wrapper_stays(net, make_trainer):
    """A method that is wrapped during the training keeps that wrapper, and works, after it."""
    calls = []

    class Wraps(Callback):
        def on_train_start(self, trainer, pl_module):
            below = trainer.strategy.training_step

            def wrapper(*args, **kwargs):
                calls.append(None)
                return below(*args, **kwargs)

            trainer.strategy.training_step = wrapper

    trainer = make_trainer(EpochTimerCallback(), Wraps())
    trainer.fit(net())
    timed = len(calls)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net())

    assert timed == 6
    assert len(calls) > timed
    assert trainer.state.finished
