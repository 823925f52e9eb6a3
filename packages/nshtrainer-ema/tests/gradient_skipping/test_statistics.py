"""The statistics of norms, against the same rules in plain Python."""

from __future__ import annotations

import math
import random
import statistics as plain

import pytest
import torch

from nshtrainer.testing.syncs import HostSyncs
from nshtrainer_ema import GradientSkippingCallbackConfig
from nshtrainer_ema.gradient_skipping.statistics import make_statistics

INF, NAN = math.inf, math.nan


def zscore_limits(norms, counted, *, sigmas=2.5, decay=0.97, warmup=25):
    """The limit before each norm: ZClip's rule, over the norms that are counted."""
    seen: list[float] = []
    mean = variance = 0.0
    for norm, counts in zip(norms, counted, strict=True):
        yield mean + sigmas * math.sqrt(variance) if len(seen) >= warmup else INF
        if not counts:
            continue
        seen.append(norm)
        if len(seen) <= warmup:
            mean, variance = plain.fmean(seen), plain.pvariance(seen)
        else:
            mean = decay * mean + (1 - decay) * norm
            variance = decay * variance + (1 - decay) * (norm - mean) ** 2


def sigma_limits(norms, counted, *, sigmas=6.0, window=128, warmup=64):
    seen: list[float] = []
    for norm, counts in zip(norms, counted, strict=True):
        last = seen[-window:]
        if len(seen) < warmup:
            yield INF
        else:
            yield plain.fmean(last) + sigmas * plain.stdev(last)
        seen += [norm] * counts


def percentile_limits(norms, counted, *, percentile, factor=1.0, window=1000, warmup=100):
    seen: list[float] = []
    for norm, counts in zip(norms, counted, strict=True):
        ranked = sorted(seen[-window:])
        if len(seen) < warmup:
            yield INF
        else:
            place = (len(ranked) - 1) * percentile / 100
            low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
            yield factor * (low + (high - low) * (place - math.floor(place)))
        seen += [norm] * counts


POLICIES = {
    "zscore": ({"policy": "zscore"}, zscore_limits, {}),
    "zscore with options": (
        {"policy": "zscore", "sigmas": 4, "statistics_decay": 0.5, "warmup_steps": 2},
        zscore_limits,
        {"sigmas": 4, "decay": 0.5, "warmup": 2},
    ),
    "sigma": ({"policy": "sigma"}, sigma_limits, {}),
    "sigma with options": (
        {"policy": "sigma", "sigmas": 2.0, "window": 7, "warmup_steps": 5},
        sigma_limits,
        {"sigmas": 2.0, "window": 7, "warmup": 5},
    ),
    "percentile": (
        {"policy": "percentile", "percentile": 99},
        percentile_limits,
        {"percentile": 99},
    ),
    "percentile with options": (
        {
            "policy": "percentile",
            "percentile": 37.5,
            "percentile_factor": 3,
            "window": 16,
            "warmup_steps": 3,
        },
        percentile_limits,
        {"percentile": 37.5, "factor": 3, "window": 16, "warmup": 3},
    ),
    "largest of a window": (
        {
            "policy": "percentile",
            "percentile": 100,
            "percentile_factor": 2,
            "window": 10,
            "warmup_steps": 2,
        },
        percentile_limits,
        {"percentile": 100, "factor": 2, "window": 10, "warmup": 2},
    ),
}


def make(**options):
    found = make_statistics(GradientSkippingCallbackConfig(**options))
    assert found is not None
    return found


def noise(count, seed=0):
    """Norms as in training: falling, and scattered."""
    generator = random.Random(seed)  # noqa: S311 -- no secret
    return [
        torch.tensor(generator.lognormvariate(0, 0.3) + 10 / (i + 1)).item() for i in range(count)
    ]


def limits_of(statistics, norms, counted):
    for norm, counts in zip(norms, counted, strict=True):
        yield statistics.limit(torch.tensor(norm)).item()
        statistics.update(torch.tensor(norm), torch.tensor(counts))


@pytest.mark.parametrize("policy", POLICIES)
def test_limits_are_those_of_the_published_rule(policy):
    """Before every one of 300 norms, a tenth of which do not count."""
    options, reference, arguments = POLICIES[policy]
    norms = noise(300)
    counted = [i % 10 != 7 for i in range(300)]

    found = list(limits_of(make(**options), norms, counted))

    assert found == pytest.approx(list(reference(norms, counted, **arguments)), rel=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("odd", [INF, -INF, NAN, 1e38])
def test_what_does_not_count_changes_nothing_bitwise(policy, odd):
    """Neither a NaN nor a spike leaves a trace, in warm-up or after."""
    options = POLICIES[policy][0]
    clean, with_odd = make(**options), make(**options)
    for norm in noise(150):
        with_odd.update(torch.tensor(odd), torch.tensor(False))
        for statistics in (clean, with_odd):
            statistics.update(torch.tensor(norm), torch.tensor(True))

    one, other = clean.state_dict(), with_odd.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_go_on_bitwise_after_a_round_trip(policy):
    """Saved in the middle of the warm-up, or after."""
    options = POLICIES[policy][0]
    for at in (0, 1, 60, 140):
        norms, counted = noise(200), [True] * 200
        straight = list(limits_of(make(**options), norms, counted))
        first, second = make(**options), make(**options)
        begun = list(limits_of(first, norms[:at], counted[:at]))
        assert second.load_state_dict(first.state_dict())

        assert begun + list(limits_of(second, norms[at:], counted[at:])) == straight


def test_a_saved_state_is_a_copy():
    """What happens after a save is not in it."""
    statistics = make(policy="sigma")
    statistics.update(torch.tensor(1.0), torch.tensor(True))
    saved = statistics.state_dict()
    statistics.update(torch.tensor(2.0), torch.tensor(True))

    assert saved["count"] == 1
    assert saved["norms"].sum() == 1


def test_statistics_of_another_shape_are_refused():
    """Another window, or another kind, is not taken for one's own."""
    window = make(policy="sigma", window=8)
    window.update(torch.tensor(1.0), torch.tensor(True))

    assert not make(policy="sigma", window=9).load_state_dict(window.state_dict())
    assert not make(policy="zscore").load_state_dict(window.state_dict())
    assert make(policy="sigma", window=8).load_state_dict(window.state_dict())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_never_waits(policy):
    """Neither for a limit nor for an update."""
    statistics = make(**POLICIES[policy][0])
    norms = [torch.tensor(norm) for norm in noise(120)]
    counts = torch.tensor(True)
    with HostSyncs() as syncs:
        syncs.section = "here"
        for norm in norms:
            statistics.limit(norm)
            statistics.update(norm, counts)

    assert syncs.counts == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_norm_near_the_end_of_fp32_is_forgotten(policy):
    """Its square is no fp32 number; an average that was infinite once would stay so."""
    statistics = make(**POLICIES[policy][0])
    statistics.update(torch.tensor(1e38), torch.tensor(True))
    for _ in range(6000 if policy == "zscore" else 1100):
        statistics.update(torch.tensor(1.0), torch.tensor(True))

    assert statistics.limit(torch.tensor(1.0)).item() < 10


def test_the_percentile_stays_where_it_is():
    """A policy that leaves out 5% of the norms goes on to leave out 5%, not more and more."""
    statistics = make(policy="percentile", percentile=95, window=200)
    norms = noise(4000, seed=3)
    limits = list(limits_of(statistics, norms, [True] * 4000))
    late = [norm > limit for norm, limit in zip(norms, limits, strict=True)][2000:]

    assert 0.03 < sum(late) / len(late) < 0.07


@pytest.mark.parametrize(
    "options", [{"policy": "zscore"}, {"policy": "sigma"}, {"policy": "sigma", "sigmas": 2.5}]
)
def test_limits_do_not_close_in_on_what_they_let_pass(options):
    """With the defaults, of normal norms not more than a few are ever taken for spikes."""
    statistics, generator, spikes = make(**options), random.Random(5), 0  # noqa: S311 -- no secret
    for i in range(3000):
        norm = torch.tensor(generator.gauss(10, 1))
        over = norm > statistics.limit(norm)
        statistics.update(norm, ~over)
        spikes += bool(over) and i >= 1500

    assert spikes / 1500 < 0.05
