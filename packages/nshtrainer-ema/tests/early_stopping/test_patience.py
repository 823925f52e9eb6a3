"""Patience in checks, steps and time, and what counts as better."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from nshtrainer import MetricConfig
from nshtrainer_ema import EarlyStoppingCallback
from nshtrainer_ema.early_stopping.patience import Moment, TrainingClock, Wait, improves


def better(value: float, best: float, mode: Any, min_delta: float, relative: bool) -> bool:
    pair = (torch.tensor(x, dtype=torch.float64) for x in (value, best))
    return improves(*pair, mode=mode, min_delta=min_delta, relative=relative)


@pytest.mark.parametrize(
    ("value", "best", "mode", "min_delta", "relative", "expected"),
    [
        (89.0, 100.0, "min", 0.1, True, True),
        (91.0, 100.0, "min", 0.1, True, False),
        (111.0, 100.0, "max", 0.1, True, True),
        (109.0, 100.0, "max", 0.1, True, False),
        (-111.0, -100.0, "min", 0.1, True, True),
        (-109.0, -100.0, "min", 0.1, True, False),
        (-89.0, -100.0, "max", 0.1, True, True),
        (-91.0, -100.0, "max", 0.1, True, False),
        (-1e-9, 0.0, "min", 0.1, True, True),
        (0.0, 0.0, "min", 0.1, True, False),
        (1e-9, 0.0, "max", 0.1, True, True),
        (5.0, math.inf, "min", 0.1, True, True),
        (5.0, -math.inf, "max", math.inf, False, True),
        (math.inf, math.inf, "min", 0.0, False, False),
        (-math.inf, 5.0, "min", 0.1, True, True),
        (math.nan, math.inf, "min", 0.1, False, False),
        (math.nan, 1.0, "max", 0.0, True, False),
        (1.0, 2.0, "min", math.inf, False, False),
        (0.5, 1.0, "min", 0.5, False, False),
        (0.4, 1.0, "min", 0.5, False, True),
    ],
)
def test_what_counts_as_better(value, best, mode, min_delta, relative, expected):
    """More than the difference; a relative one is of the best value's size, whatever its sign."""
    assert better(value, best, mode, min_delta, relative) is expected


numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers, st.sampled_from([0.0, 0.01, 0.5]), st.booleans())
def test_min_and_max_mirror_each_other(value, best, min_delta, relative):
    """A value is better for `max` exactly if its negative is for `min`; never both ways."""
    up = better(value, best, "max", min_delta, relative)

    assert up == better(-value, -best, "min", min_delta, relative)
    assert not (up and better(value, best, "min", min_delta, relative))


@given(
    st.lists(st.sampled_from([1.0, 2.0, 2.5, 3.0, 3.5, 8.0, math.nan, math.inf]), max_size=12),
    st.sampled_from(["min", "max"]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.sampled_from([None, 1.5, 3.2]),
    st.sampled_from([None, 2.2, 7.0]),
)
def test_checks_end_training_where_lightnings_do(
    values, mode, patience, min_delta, check_finite, stopping, divergence
):
    """With patience in checks and an absolute difference: the same answers, reasons and counts."""
    options = {
        "patience": patience, "min_delta": min_delta, "check_finite": check_finite,
        "stopping_threshold": stopping, "divergence_threshold": divergence,
    }  # fmt: skip
    theirs = EarlyStopping("m", mode=mode, **options)
    ours = EarlyStoppingCallback(metric=MetricConfig(name="m", mode=mode), **options)
    for value in map(torch.tensor, values):
        stop, _ = theirs._evaluate_stopping_criteria(value)
        assert ours._evaluate_stopping_criteria(value)[0] == stop
        if stop:
            assert ours.stopping_reason is theirs.stopping_reason
            return
        assert (ours.wait_count, float(ours.best_score)) == (theirs.wait_count, theirs.best_score)


def test_a_float64_metric_that_stands_still_is_not_better_after_a_resume(metric):
    """The best value comes back as it was, to the last bit."""
    value = torch.tensor(0.1, dtype=torch.float64)
    first = EarlyStoppingCallback(metric=metric, patience=3, min_delta=0.0)
    first._evaluate_stopping_criteria(value)
    second = EarlyStoppingCallback(metric=metric, patience=3, min_delta=0.0)
    second.load_state_dict(first.state_dict())
    second._evaluate_stopping_criteria(value)

    assert (first.wait_count, second.wait_count) == (0, 1)


def test_a_relative_difference_stops_a_slow_descent(fit, metric):
    """Two percent a check is not enough where five are asked for."""
    values = [100.0 * 0.98**n for n in range(9)]
    options: dict[str, Any] = {"metric": metric, "patience": 2, "min_delta": 0.05}
    stopper = EarlyStoppingCallback(**options, min_delta_mode="relative")
    fit(stopper, values)
    # Against the best one that counted: the third after it is better by more than 5 %.
    assert stopper.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert stopper.stopped_epoch == 2

    stopper = EarlyStoppingCallback(**options)
    assert fit(stopper, values).current_epoch == 9


@pytest.mark.parametrize(("patience", "steps"), [(0, 4), (1, 4), (2, 4), (3, 6), (4, 6), (5, 8)])
def test_patience_in_steps_is_looked_at_when_the_metric_is_checked(patience, steps, fit, metric):
    """The first value is best, at step 2; a check every two steps."""
    stopper = EarlyStoppingCallback(metric=metric, patience=patience, patience_unit="steps")
    trainer = fit(stopper, [1.0] * 9)

    assert trainer.global_step == steps
    assert f"in the last {steps - 2} steps" in (stopper.stopping_reason_message or "")


def test_steps_are_optimizer_steps(fit, metric):
    """Accumulated batches count once."""
    stopper = EarlyStoppingCallback(metric=metric, patience=3, patience_unit="steps")

    assert fit(stopper, [1.0] * 9, batches=4, accumulate_grad_batches=4).global_step == 4


def test_patience_begins_at_the_first_check(fit, metric):
    """Steps before it, skipped epochs say, do not count."""
    stopper = EarlyStoppingCallback(
        metric=metric, patience=4, patience_unit="steps", skip_first_n_epochs=3
    )

    assert fit(stopper, [1.0] * 9).global_step == 8 + 4


class Ticking(Callback):
    """Has a stopper's clock go on by so much per batch, and stand still else."""

    def __init__(self, stopper: EarlyStoppingCallback, seconds: float) -> None:
        self.time, self.seconds = 1000.0, seconds
        stopper._clock = TrainingClock(lambda: self.time)

    def on_train_batch_end(self, *args: Any) -> None:
        self.time += self.seconds


@pytest.mark.parametrize(
    ("patience", "unit", "epochs", "waited"),
    [
        (6000, "seconds", 3, "7200 seconds"),
        (120, "minutes", 3, "120 minutes"),
        (2, "hours", 3, "2 hours"),
        (3, "hours", 4, "3 hours"),
        (1, "hours", 2, "1 hour."),
    ],
)
def test_patience_in_time(patience, unit, epochs, waited, fit, metric):
    """An epoch of two batches takes an hour; the first value is the best."""
    stopper = EarlyStoppingCallback(metric=metric, patience=patience, patience_unit=unit)
    trainer = fit(stopper, [1.0] * 9, Ticking(stopper, 1800.0))

    assert trainer.current_epoch == epochs
    assert f"in the last {waited}" in (stopper.stopping_reason_message or "")


def test_time_adds_up_over_resumed_runs_and_leaves_out_what_lies_between(fit, metric, tmp_path):
    """Three hours of patience: the best value is of the first hour, the end in the fourth."""

    def run(epochs: int, name: str, **options: Any) -> tuple[int, dict[str, Any]]:
        stopper = EarlyStoppingCallback(metric=metric, patience=3, patience_unit="hours")
        saver = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        options |= {"max_epochs": epochs, "enable_checkpointing": True}
        trainer = fit(stopper, values, Ticking(stopper, 1800.0), saver, **options)
        return trainer.current_epoch, stopper.state_dict()

    whole = run(6, "whole")
    run(2, "first")
    resumed = run(6, "second", first=2, ckpt_path=tmp_path / "first" / "epoch=1.ckpt")

    assert whole[0] == 4
    assert resumed == whole
    assert whole[1]["seconds"] == 4 * 3600.0


def test_a_second_fit_does_not_count_the_time_before_it(fit, metric):
    """What is done between two fits of one trainer is not training."""
    stopper = EarlyStoppingCallback(metric=metric, patience=9, patience_unit="hours")
    ticking = Ticking(stopper, 1800.0)
    fit(stopper, [1.0], ticking)
    ticking.time += 1e6
    fit(stopper, [1.0], ticking)

    assert stopper.state_dict()["seconds"] == 2 * 3600.0


def test_a_failed_fit_stops_the_clock(fit, metric):
    """A callback that is used again after an exception has counted training only."""

    class Fails(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("no")

    stopper = EarlyStoppingCallback(metric=metric, patience=9, patience_unit="hours")
    ticking = Ticking(stopper, 1800.0)
    with pytest.raises(RuntimeError, match="no"):
        fit(stopper, [1.0], Fails(), ticking)
    ticking.time += 1e6

    assert stopper.state_dict()["seconds"] == 3600.0


def test_another_unit_goes_on_with_what_the_file_tells(metric):
    """Steps are in every file; time begins at the resume where the file has none."""
    old = EarlyStoppingCallback(metric=metric, patience=3)
    old._now = Moment(40, 0.0)
    old._evaluate_stopping_criteria(torch.tensor(1.0))
    assert "seconds" not in old.state_dict()

    steps = EarlyStoppingCallback(metric=metric, patience=10, patience_unit="steps")
    steps.load_state_dict(old.state_dict())
    steps._now = Moment(50, 0.0)
    assert steps._evaluate_stopping_criteria(torch.tensor(1.0))[0]

    hours = EarlyStoppingCallback(metric=metric, patience=1, patience_unit="hours")
    hours.load_state_dict(old.state_dict())
    hours._now = Moment(50, 3599.0)
    assert not hours._evaluate_stopping_criteria(torch.tensor(1.0))[0]
    hours._now = Moment(50, 3600.0)
    assert hours._evaluate_stopping_criteria(torch.tensor(1.0))[0]


def test_a_state_of_an_earlier_version_is_read(metric):
    """Without the steps and seconds that it could not know, waiting begins at the next check."""
    known = {
        "wait_count": 2, "stopped_epoch": 0, "best_score": 1.0, "patience": 3,
        "stopping_reason": 0, "stopping_reason_message": None, "monitor": "val/metric",
    }  # fmt: skip
    stopper = EarlyStoppingCallback(metric=metric, patience=4, patience_unit="steps")
    stopper.load_state_dict(known)
    for step, stops in ((10, False), (13, False), (14, True)):
        stopper._now = Moment(step, 0.0)
        assert stopper._evaluate_stopping_criteria(torch.tensor(1.0))[0] is stops


def test_the_clock_counts_only_while_it_runs():
    """And is not set back or forward by anything but time."""
    now = 5.0
    clock = TrainingClock(lambda: now)
    clock.run()
    now = 8.0
    assert clock.seconds == 3.0
    clock.run()
    now = 9.0
    clock.pause()
    now = 100.0
    assert clock.seconds == 4.0
    clock.reset(60.0)
    assert clock.seconds == 60.0
    clock.run()
    now = 101.5
    assert clock.seconds == 61.5


def test_a_wait_says_how_long_it_is():
    """In words, with the unit."""
    for unit, text in (("checks", "3 checks"), ("steps", "1 step"), ("minutes", "1.5 minutes")):
        wait = Wait(unit)
        wait.observe(Moment(7, 10.0), 0)
        wait.observe(Moment(8, 100.0), 3)
        assert str(wait) == text


def test_sharing_a_folder_of_states_is_plain_data(metric, tmp_path: Path):
    """Files are read with `weights_only=True`."""
    stopper = EarlyStoppingCallback(metric=metric, patience=3, patience_unit="hours")
    stopper._evaluate_stopping_criteria(torch.tensor(1.0))
    torch.save(stopper.state_dict(), tmp_path / "state.pt")

    assert torch.load(tmp_path / "state.pt", weights_only=True) == stopper.state_dict()
