"""The arithmetic of power-function profiles, against profiles that are added up step by step."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nshtrainer import ConfigError
from nshtrainer_ema.ema.power_function import (
    MAX_SIGMA_REL,
    ReconstructionError,
    decay_at,
    decay_over,
    fit_profile,
    gamma_of,
    inner_product,
    reconstruction_weights,
    sigma_rel_of,
)

CELLS = 20_000
WIDTHS = [1e-9, 1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, 0.28867]


def profile(step: float, gamma: float, end: float) -> Tensor:
    """Mean of a profile over each of the cells into which the steps up to *end* are cut; float64."""
    edges = torch.linspace(0, end, CELLS + 1, dtype=torch.float64).clamp(max=step) / step
    return (edges ** (gamma + 1)).diff() * CELLS / end


def norm(values: Tensor, end: float) -> float:
    return math.sqrt(float(values.square().sum()) * end / CELLS)


def tracked(decays: list[float], size: int) -> Tensor:
    """How much of each step's weights is in an average that was moved with *decays*."""
    share = torch.zeros(size, dtype=torch.float64)
    for at, decay in enumerate(decays):
        share *= decay
        share[at] += 1 - decay
    return share


def snapshots(every: int, last: int, *widths: float) -> tuple[list[int], list[float]]:
    found = [(t, gamma_of(w)) for t in range(every, last + 1, every) for w in widths]
    return [t for t, _ in found], [g for _, g in found]


# ---- width and exponent ------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_width_and_exponent_are_inverse(sigma_rel):
    """Over the whole range, to the last digits; and the cubic holds."""
    gamma = gamma_of(sigma_rel)

    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-12)


@pytest.mark.parametrize("gamma", [1e-6, 0.5, 1, 6.94, 16.97, 1e4])
def test_exponent_and_width_are_inverse(gamma):
    """The other way round."""
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9)


def test_the_exponents_of_the_paper():
    """Karras et al. give 16.97 and 6.94 for widths of 5 % and 10 %."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    """As a fraction of training, added up numerically."""
    density = profile(1.0, gamma_of(sigma_rel), 1.0) / CELLS
    middle = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
    mean = (density * middle).sum()

    assert float(density.sum()) == pytest.approx(1)
    assert float((density * (middle - mean) ** 2).sum().sqrt()) == pytest.approx(
        sigma_rel, rel=1e-4
    )


@pytest.mark.parametrize("sigma_rel", [0, -0.1, MAX_SIGMA_REL, 0.5, math.inf, math.nan])
def test_other_widths_are_refused(sigma_rel):
    """The message has the range and an example."""
    with pytest.raises(ConfigError, match=r"below 0\.2887 .* such as 0\.05"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("gamma", [0, -1, math.inf, math.nan])
def test_other_exponents_are_refused(gamma):
    """The message says where one comes from."""
    with pytest.raises(ConfigError, match="`gamma_of` computes it"):
        sigma_rel_of(gamma)


# ---- decays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 1, 6.94, 16.97])
def test_updates_of_every_step_have_the_profile(gamma):
    """Each step's share is the integral of the profile over that step; the start has none."""
    steps = 200
    share = tracked([decay_at(t, gamma) for t in range(1, steps + 1)], steps)

    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(share, (edges ** (gamma + 1)).diff(), rtol=1e-12, atol=1e-16)
    assert decay_at(1, gamma) == 0


@pytest.mark.parametrize("gamma", [0, 6.94])
def test_updates_at_intervals_telescope(gamma):
    """However the steps are cut into intervals, the product of the decays is that of the single steps."""
    cuts = [5, 6, 8, 40, 41, 100, 350, 351, 600, 1000]
    product = math.prod(
        decay_over(cut, cut - before, gamma) for before, cut in itertools.pairwise(cuts)
    )

    assert product == pytest.approx((cuts[0] / cuts[-1]) ** (gamma + 1), rel=1e-12)
    single = math.prod(decay_at(t, gamma) for t in range(cuts[0] + 1, cuts[-1] + 1))
    assert product == pytest.approx(single, rel=1e-11)


def test_the_first_update_copies_whenever_it_is():
    """Nothing of what was there before training stays."""
    assert decay_over(8, 8, 6.94) == 0
    assert 0 < decay_over(16, 8, 6.94) < decay_over(24, 8, 6.94) < 1


@pytest.mark.parametrize(("step", "n"), [(0, 1), (1, 0), (3, 4), (3, -1)])
def test_impossible_intervals_are_refused(step, n):
    """With the numbers."""
    with pytest.raises(ValueError, match=f"step {step} cannot cover {n} steps"):
        decay_over(step, n, 1.0)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_profiles_of_other_exponents_are_refused(gamma):
    """By whatever takes an exponent."""
    for call in (
        lambda: decay_at(2, gamma),
        lambda: inner_product(1, 1, 1, gamma),
        lambda: reconstruction_weights([1], [gamma], 1, 1),
    ):
        with pytest.raises(ValueError, match="at least 0"):
            call()


# ---- inner products ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_a", "gamma_a", "step_b", "gamma_b"),
    [(80, 6.94, 100, 16.97), (100, 16.97, 80, 6.94), (100, 0, 100, 3), (7, 2, 100, 0.5)],
)
def test_the_inner_product_is_the_integral(step_a, gamma_a, step_b, gamma_b):
    """Of two profiles that are added up cell by cell; either may end first."""
    a, b = profile(step_a, gamma_a, 100), profile(step_b, gamma_b, 100)
    expected = float((a * b).sum()) * 100 / CELLS

    assert inner_product(step_a, gamma_a, step_b, gamma_b) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("step", [0, -1, math.inf, math.nan])
def test_a_profile_has_to_end_somewhere(step):
    """Steps are counted from 1."""
    with pytest.raises(ValueError, match="counted from 1"):
        inner_product(step, 1, 1, 1)


# ---- least squares -----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.1, 0.15])
@pytest.mark.parametrize("step", [1000, 700])
def test_the_sum_is_the_nearest_that_there_is(sigma_rel, step):
    """No worse than least squares on profiles in cells, and as far off as is said."""
    steps, gammas = snapshots(100, 1000, 0.05, 0.1)
    target = gamma_of(sigma_rel)
    fit = fit_profile(steps, gammas, step, target, max_error=1)

    columns = torch.stack([profile(t, g, 1000) for t, g in zip(steps, gammas, strict=True)], 1)
    aim = profile(step, target, 1000)
    best = torch.linalg.lstsq(columns, aim[:, None]).solution[:, 0]
    size = norm(aim, 1000)
    reached = norm(columns @ torch.tensor(fit.weights, dtype=torch.float64) - aim, 1000) / size
    possible = norm(columns @ best - aim, 1000) / size
    assert sum(fit.weights) == pytest.approx(1, abs=1e-9)
    assert reached <= possible * 1.05 + 1e-4
    assert fit.error == pytest.approx(reached, rel=0.02, abs=1e-3)


def test_a_profile_that_was_tracked_is_taken_as_it_is():
    """Its weight is 1 and the others' 0, also at an earlier step."""
    steps, gammas = snapshots(50, 1000, 0.05, 0.1)
    for index in (39, 20):
        fit = fit_profile(steps, gammas, steps[index], gammas[index])

        expected = [float(i == index) for i in range(40)]
        assert fit.weights == pytest.approx(expected, abs=1e-4)
        assert fit.error < 1e-5


def test_order_and_unit_of_the_steps_do_not_matter():
    """Epochs give the weights that steps give."""
    steps, gammas = snapshots(100, 1000, 0.05, 0.1)
    target = gamma_of(0.08)
    expected = reconstruction_weights(steps, gammas, 1000, target)

    backwards = reconstruction_weights(steps[::-1], gammas[::-1], 1000, target)
    assert backwards[::-1] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    in_epochs = reconstruction_weights([t / 100 for t in steps], gammas, 10, target)
    assert in_epochs == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_more_snapshots_come_nearer():
    """The error falls with their number, over a wide range of widths."""
    for sigma_rel in (0.03, 0.07, 0.15, 0.2):
        errors = [
            fit_profile(
                *snapshots(e, 4000, 0.05, 0.1), 4000, gamma_of(sigma_rel), max_error=9
            ).error
            for e in (1000, 200, 40)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.05


def test_profiles_that_are_nearly_alike_do_not_blow_up():
    """Many snapshots of two widths that hardly differ count as one width, and 1000 as 1000."""
    steps, gammas = snapshots(10, 5000, 0.1)
    alike = [gamma_of(0.1 * (1 + 1e-10))] * len(steps)
    fit = fit_profile(steps + steps, gammas + alike, 5000, gamma_of(0.12))

    one = fit_profile(steps, gammas, 5000, gamma_of(0.12))
    assert sum(map(abs, fit.weights)) < 2 * sum(map(abs, one.weights))
    assert fit.error == pytest.approx(one.error, rel=0.1)


def test_coarse_snapshots_get_gentle_weights():
    """What is rounded to fp16 is not multiplied by what fp32 can bear."""
    steps, gammas = snapshots(20, 2000, 0.05, 0.1)
    fine, coarse = (
        fit_profile(steps, gammas, 2000, gamma_of(0.03), rounding=r, max_error=1)
        for r in (2.0**-24, 2.0**-8)
    )

    assert sum(map(abs, coarse.weights)) < sum(map(abs, fine.weights))
    assert coarse.error > fine.error
    assert sum(coarse.weights) == pytest.approx(1)


def test_what_comes_after_the_last_snapshot_is_not_known():
    """A step later than all snapshots is refused, with the last one there is."""
    with pytest.raises(ReconstructionError, match=r"last snapshot is of step 1000.*Ask for that"):
        reconstruction_weights(*snapshots(100, 1000, 0.05, 0.1), 1001, gamma_of(0.1))


@pytest.mark.parametrize(
    ("step", "sigma_rel"),
    [(1000, 0.005), (930, 0.05), (3, 0.1)],
    ids=["narrow", "between", "early"],
)
def test_what_the_snapshots_do_not_give_is_refused(step, sigma_rel):
    """The message says how far off the nearest is, and what to ask for."""
    with pytest.raises(ReconstructionError, match=r"off by \d+\.\d%, and at most 10\.0% .*Ask for"):
        reconstruction_weights(*snapshots(100, 1000, 0.05, 0.1), step, gamma_of(sigma_rel))


@pytest.mark.parametrize(
    ("steps", "gammas", "said"),
    [
        ([1, 2], [1.0], "2 steps and 1 gammas"),
        ([], [], "no snapshot"),
        ([5, 5], [1.0, 1.0], "step 5 with gamma=1.0 is given twice"),
        ([0], [1.0], "counted from 1"),
    ],
    ids=["lengths", "empty", "twice", "step 0"],
)
def test_snapshots_that_cannot_be_are_refused(steps, gammas, said):
    """Each with what is wrong."""
    with pytest.raises(ValueError, match=said):
        reconstruction_weights(steps, gammas, 1, 1.0)


def test_widths_are_checked_without_torch():
    """A configuration can be validated where torch is not installed."""
    code = (
        "import sys; from nshtrainer_ema.ema.power_function import gamma_of; gamma_of(0.1);"
        "from nshtrainer_ema.ema.snapshots import list_snapshots;"
        "print([m for m in ('torch', 'lightning', 'numpy', 'click') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
