"""The decay at each step, against its formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nshtrainer_ema import EMACallbackConfig
from nshtrainer_ema.ema.options import AverageOptions
from nshtrainer_ema.ema.schedule import DecaySchedule, schedules_of

DECAY = 0.9
FORMULAS: dict[str, Any] = {
    "inverse_power": lambda n: 1 - (1 + (n - 1) / 2.0) ** -0.75,
    "bias_correction": lambda n: DECAY * (1 - DECAY ** (n - 1)) / (1 - DECAY**n),
    "half_life": lambda n: 0.5 ** (1 / (0.1 * n)),
    "tensorflow": lambda n: (1 + n) / (10 + n),
    "linear": lambda n: DECAY * n / 20,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "inverse_power": {"warmup_power": 0.75, "warmup_inv_gamma": 2.0},
    "half_life": {"warmup_ratio": 0.1},
    "linear": {"warmup_steps": 20},
}


def schedule(**options: Any) -> DecaySchedule:
    return next(iter(schedules_of(AverageOptions(**options)).values()))


@pytest.mark.parametrize("warmup", FORMULAS)
def test_a_warm_up_follows_its_formula_up_to_the_decay(warmup: Any):
    """From the first step on, and never above."""
    made = schedule(decay=DECAY, warmup=warmup, **OPTIONS.get(warmup, {}))

    for n in (1, 2, 3, 10, 50, 1000):
        assert made.of_update(n) == pytest.approx(min(DECAY, FORMULAS[warmup](n)))


@pytest.mark.parametrize("warmup", ["inverse_power", "bias_correction"])
def test_the_first_update_copies(warmup: Any):
    """Nothing of the initial weights stays in the average."""
    assert schedule(decay=DECAY, warmup=warmup).of_update(1) == 0


@pytest.mark.parametrize("warmup", [None, *FORMULAS])
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("every", [1, 4])
def test_an_interval_moves_as_far_as_single_updates(warmup: Any, start: int, every: int):
    """The decay of an update every n steps is the product of the n."""
    shared = {"decay": DECAY, "warmup": warmup, "start_step": start, **OPTIONS.get(warmup, {})}
    single, made = schedule(**shared), schedule(every_n_steps=every, **shared)

    for step in (4, 8, 12, 40):
        product = math.prod(single.of_update(step - i) for i in range(every))
        assert made.of_update(step) == pytest.approx(product)


@pytest.mark.parametrize("warmup", [None, *FORMULAS])
@pytest.mark.parametrize("every", [1, 4])
def test_a_count_on_the_device_gives_the_same_decay(warmup: Any, every: int):
    """To the last digit of the weights."""
    made = schedule(
        decay=DECAY, warmup=warmup, start_step=3, every_n_steps=every, **OPTIONS.get(warmup, {})
    )

    for step in (4, 8, 40):
        assert float(made.of_update(torch.tensor(step))) == pytest.approx(made.of_update(step))


def test_the_average_follows_the_weights_until_the_start():
    """Its decay is 0 until then, for profiles too."""
    made = schedule(decay=DECAY, start_step=3)
    profile = schedule(profiles=[0.1], start_step=3)

    assert [made.of_update(n) for n in (1, 3, 4)] == [0, 0, DECAY]
    assert [profile.of_update(n) for n in (1, 3, 4)] == [0, 0, 0]
    assert 0 < profile.of_update(5) < 1


def test_a_half_life_is_another_way_to_say_the_decay():
    """In steps, and in samples of steps of whatever size."""
    steps, samples = schedule(half_life_steps=10.0), schedule(half_life_samples=640.0)

    assert steps.of_update(7) ** 10 == pytest.approx(0.5)
    assert samples.of_update(7, 64.0) == pytest.approx(steps.of_update(7))
    assert samples.of_update(7, 640.0) == pytest.approx(0.5)
    every = schedule(half_life_samples=640.0, every_n_steps=5)
    assert every.of_update(5, 320.0) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_bias_correction_at_the_ends_of_the_range(decay: float):
    """0 follows the weights; 1 is the plain mean of them."""
    made = schedule(decay=decay, warmup="bias_correction")

    assert made.of_update(4) == pytest.approx(0.75 * decay)
    assert float(made.of_update(torch.tensor(4))) == pytest.approx(0.75 * decay)


def test_further_averages_have_labels():
    """The first is the one that is evaluated."""
    options = AverageOptions(decay=0.9, extra_decays=[0.5, 0.99], profiles=[0.05])

    assert list(schedules_of(options)) == ["average", "decay=0.5", "decay=0.99", "sigma_rel=0.05"]
    assert next(iter(schedules_of(AverageOptions(profiles=[0.1, 0.05])))) == "sigma_rel=0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how fast the average moves"),
        ({"decay": 0.9, "half_life_steps": 10}, "say the same in different ways"),
        ({"half_life_samples": 5, "half_life_steps": 10}, "say the same in different ways"),
        ({"decay": 0.9, "warmup": "linear"}, "needs `warmup_steps`"),
        ({"decay": 0.9, "warmup": "tensorflow", "warmup_steps": 5}, "belongs to warmup='linear'"),
        ({"decay": 0.9, "warmup_ratio": 0.5}, "belongs to warmup='half_life'"),
        ({"decay": 0.9, "warmup": "cosine"}, "inverse_power"),
        ({"decay": 0.9, "buffers": "drop"}, "copy"),
        ({"decay": 0.9, "extra_decays": [0.5, 0.5]}, "one value twice"),
        ({"decay": 0.9, "extra_decays": [0.9]}, "one value twice"),
        ({"profiles": [0.3]}, "less than 0.28"),
        ({"decay": 0.9, "snapshot_every_n_steps": 5}, "set `profiles`"),
        ({"decay": 0.9, "start_step": -1}, "start_step"),
        ({"decay": 0.9, "half_life_steps": 0}, "half_life_steps"),
        ({"decay": 0.9, "exclude": [""]}, "exclude"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str):
    """With what to do instead."""
    with pytest.raises(ValidationError, match=message):
        EMACallbackConfig(**options)
