"""`MetricConfig`: which value is better, NaN and missing ones included."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from nshtrainer import MetricConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("new", "old", "for_min", "for_max"),
    [
        (1.0, 2.0, True, False),
        (2.0, 1.0, False, True),
        (1.0, 1.0, False, False),
        (1.0, None, True, True),
        (1.0, NAN, True, True),
        (None, 1.0, False, False),
        (NAN, 1.0, False, False),
        (NAN, None, False, False),
        (NAN, NAN, False, False),
        (None, None, False, False),
        (-INF, 0.0, True, False),
        (INF, 0.0, False, True),
        (INF, NAN, True, True),
        (0.0, -0.0, False, False),
    ],
)
def test_better_is_strict_and_nan_is_never_better(new, old, for_min, for_max):
    """Equal is not better; NaN and a missing value lose against every number and never win."""
    assert MetricConfig(name="m", mode="min").is_better(new, old) is for_min
    assert MetricConfig(name="m", mode="max").is_better(new, old) is for_max


@pytest.mark.parametrize(
    ("values", "smallest", "largest"),
    [
        ([3.0, 1.0, 2.0], 1.0, 3.0),
        ([NAN, 2.0, NAN, 1.0], 1.0, 2.0),
        ([None, 2.0], 2.0, 2.0),
        ([NAN, None], None, None),
        ([], None, None),
        ([INF, -INF], -INF, INF),
    ],
)
def test_the_best_of_several_leaves_out_what_is_no_number(values, smallest, largest):
    """Wherever a NaN stands, it does not hide the best number."""
    assert MetricConfig(name="m", mode="min").best(iter(values)) == smallest
    assert MetricConfig(name="m", mode="max").best(iter(values)) == largest


@pytest.mark.parametrize("mode", ["min", "max"])
def test_every_finite_value_beats_the_worst(mode):
    """`worst` is a start from which the first value is an improvement."""
    metric = MetricConfig(name="m", mode=mode)

    assert all(metric.is_better(v, metric.worst) for v in (-1e308, 0.0, 1e308))
    assert not metric.is_better(metric.worst, 0.0)


def test_lightnings_word_for_the_name_is_taken_too():
    """`monitor` and `name` are one field; blanks around it do not count."""
    assert MetricConfig(monitor=" val/loss ", mode="min") == MetricConfig(
        name="val/loss", mode="min"
    )
    assert MetricConfig(name="a", mode="max").monitor == "a"
    assert MetricConfig(monitor="a", mode="max").model_dump() == {"name": "a", "mode": "max"}


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"name": "", "mode": "min"}, "name"),
        ({"name": "  ", "mode": "min"}, "name"),
        ({"name": 3, "mode": "min"}, "name"),
        ({"name": "a", "mode": "minimum"}, "mode"),
        ({"name": "a"}, "mode"),
        ({"mode": "min"}, "name"),
        ({"name": "a", "mode": "min", "monitr": "b"}, "monitr"),
    ],
)
def test_a_metric_that_nothing_can_wait_for_is_refused(fields, where):
    """An empty name would be found missing only after the first validation of a run."""
    with pytest.raises(ValidationError) as caught:
        MetricConfig(**fields)

    assert caught.value.errors()[0]["loc"] == (where,)
