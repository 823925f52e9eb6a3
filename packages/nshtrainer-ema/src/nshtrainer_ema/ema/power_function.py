"""Averages whose memory grows with training, and what can be made of several of them afterwards.

An average with the profile of exponent `gamma` weighs the weights of step tau, at step t, by

    p(tau) = (gamma + 1) * tau^gamma / t^(gamma + 1),    0 < tau <= t,

so that it always looks back over the same *fraction* of training. The width of the profile, its
standard deviation divided by t, is called `sigma_rel`: 0.1 averages over about the last tenth.
Averages are linear in the weights: a sum of snapshots is an average whose profile is the same sum of
their profiles. Least squares finds the sum that comes nearest to a profile that nobody tracked.

Steps are counted from 1, and are those of the average: its first update, at step 1, copies the weights.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3 and appendix C, https://arxiv.org/abs/2312.02696.

Only the least squares needs torch, which is imported there: a configuration can be checked without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from nshtrainer.errors import ConfigError, NshTrainerError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAX_ERROR",
    "MAX_SIGMA_REL",
    "Fit",
    "ReconstructionError",
    "decay_at",
    "decay_over",
    "fit_profile",
    "gamma_of",
    "inner_product",
    "reconstruction_weights",
    "sigma_rel_of",
]

MAX_SIGMA_REL: Final = 12**-0.5
"""Width of the plain mean of all steps, 0.2887, which `gamma = 0` gives; profiles are narrower."""

MAX_ERROR: Final = 0.1
"""How far a reconstructed profile may be from the one that was asked for: see `Fit.error`."""

_EPSILON: Final = 2.0**-52  # of float64
_ROUNDING: Final = 2.0**-24  # of float32


class ReconstructionError(NshTrainerError, ValueError):
    """The snapshots that there are do not give the average that is asked for."""


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the profile of relative width *sigma_rel*.

    It is the positive root of `(gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2`.

    Args:
        sigma_rel: Standard deviation of the profile, as a fraction of training: above 0 and below
            `MAX_SIGMA_REL`.

    Raises:
        ConfigError: It lies outside.

    >>> round(gamma_of(0.1), 2)
    6.94
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ConfigError(
            f"sigma_rel={sigma_rel!r} is no width of a power-function profile; it is a fraction of "
            f"training above 0 and below {MAX_SIGMA_REL:.4f} (the plain mean of all steps). Use a "
            "value such as 0.05 or 0.1."
        )
    # The cubic is convex here, and positive at 1/sigma_rel: from there Newton's steps go down to
    # the root without passing it, so that the first one that does not go down ends the search.
    gamma = 1 / sigma_rel
    while True:
        width = (gamma + 2) * sigma_rel  # squared in parts: gamma^3 overflows for tiny widths
        value = width * width * (gamma + 3) - (gamma + 1)
        slope = width * sigma_rel * (3 * gamma + 8) - 1
        better = gamma - value / slope
        if not 0 < better < gamma:
            return gamma
        gamma = better


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of the profile with exponent *gamma*: the inverse of `gamma_of`.

    Args:
        gamma: Above 0 and finite.

    Raises:
        ConfigError: It is not.
    """
    if not 0 < gamma < math.inf:
        raise ConfigError(
            f"gamma={gamma!r} is no exponent of a power-function profile; it is above 0 and finite. "
            "`gamma_of` computes it from a width."
        )
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def decay_at(step: int, gamma: float) -> float:
    """Return the decay of the update at *step*, where every step updates: `(1 - 1/step)^(gamma+1)`.

    Args:
        step: Counted from 1, where the decay is 0: the first update copies.
        gamma: Exponent of the profile, at least 0.

    Raises:
        ValueError: One of them is too small.
    """
    return decay_over(step, 1, gamma)


def decay_over(step: int, n: int, gamma: float) -> float:
    """Return the decay of the update at *step* if the one before was *n* steps ago.

    It is `((step - n) / step)^(gamma + 1)`, the product of the decays of the *n* steps: the average
    keeps its profile, in which the weights at an update stand for the *n* steps up to it. Intervals may
    differ from one another.

    Args:
        step: Counted from 1. The first update copies, whenever it is: `decay_over(n, n, gamma) == 0`.
        n: Steps since the update before, or since the beginning; at least 1 and at most *step*.
        gamma: Exponent of the profile, at least 0.

    Raises:
        ValueError: One of them lies outside.
    """
    if not 1 <= n <= step:
        raise ValueError(
            f"an update at step {step} cannot cover {n} steps; steps are counted from 1, and an "
            "update covers at least 1 and at most those that there were"
        )
    _check_gamma(gamma)
    return ((step - n) / step) ** (gamma + 1)


def inner_product(step_a: float, gamma_a: float, step_b: float, gamma_b: float) -> float:
    """Return the integral over all steps of the product of two profiles, in 1/steps.

    With a the profile at the earlier step t, b the other at step u:
    `(gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * (t/u)^gamma_b / u`.

    Args:
        step_a: Where the first profile ends; above 0.
        gamma_a: Its exponent, at least 0.
        step_b: The same for the second.
        gamma_b: The same for the second.

    Raises:
        ValueError: A number lies outside.
    """
    _check_profile(step_a, gamma_a)
    _check_profile(step_b, gamma_b)
    if step_a > step_b:
        step_a, gamma_a, step_b, gamma_b = step_b, gamma_b, step_a, gamma_a
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (step_a / step_b) ** gamma_b / step_b


@dataclass(frozen=True)
class Fit:
    """A sum of profiles that stands for another one."""

    weights: list[float]
    """One for each profile; they sum to 1, and some are negative."""
    error: float
    """Distance of the sum to the profile that it stands for, as a fraction of that one's norm (both in
    L2 over training), together with what *weights* make of the rounding of the snapshots. The error of
    the averaged weights, as a fraction of how much they move in training, is usually far below."""


def reconstruction_weights(
    steps: Sequence[float],
    gammas: Sequence[float],
    target_step: float,
    target_gamma: float,
    *,
    rounding: float = _ROUNDING,
    max_error: float = MAX_ERROR,
) -> list[float]:
    """Return by what to multiply each snapshot so that their sum has the target's profile.

    Arguments and errors are those of `fit_profile`.
    """
    fit = fit_profile(
        steps, gammas, target_step, target_gamma, rounding=rounding, max_error=max_error
    )
    return fit.weights


def fit_profile(
    steps: Sequence[float],
    gammas: Sequence[float],
    target_step: float,
    target_gamma: float,
    *,
    rounding: float = _ROUNDING,
    max_error: float = MAX_ERROR,
) -> Fit:
    """Find the sum of snapshots whose profile is nearest to the target's, by least squares in float64.

    Two things are added to the paper's method. The weights are made to sum to 1, as the profile does:
    else all that is constant in training would come out scaled. And since the snapshots are rounded
    numbers, weights that would blow the rounding up more than they improve the profile are held back;
    without that, profiles that are nearly alike give huge weights of both signs.

    Args:
        steps: Where each snapshot was taken; the order does not matter.
        gammas: Exponent of the profile of each.
        target_step: Where the wanted profile ends: at most the last of *steps*, and near one of them.
        target_gamma: Exponent of the wanted profile.
        rounding: Largest relative rounding error of the snapshots: 2^-24 for fp32 (the default), 2^-11
            for fp16, 2^-8 for bf16.
        max_error: Largest `Fit.error` that is accepted.

    Raises:
        ReconstructionError: The target ends after the last snapshot, or no sum comes near it.
        ValueError: Numbers lie outside, lengths differ, nothing or something twice is given.
    """
    _check_snapshots(steps, gammas)
    _check_profile(target_step, target_gamma)
    if target_step > max(steps):
        raise ReconstructionError(
            f"the average at step {target_step:g} cannot be reconstructed: the last snapshot is of step "
            f"{max(steps):g}, and none knows what came after. Ask for that step or an earlier one."
        )
    fit = _fit(steps, gammas, target_step, target_gamma, rounding)
    if not fit.error <= max_error:
        raise ReconstructionError(
            f"{len(steps)} snapshots of steps {min(steps):g} to {max(steps):g} do not give the profile "
            f"of {_width_text(target_gamma)} at step {target_step:g}: the nearest is off by "
            f"{fit.error:.1%}, and at most {max_error:.1%} is accepted. Ask for a width nearer to those "
            "that were tracked, or for a step with a snapshot; or take more snapshots, of two widths."
        )
    return fit


def _width_text(gamma: float) -> str:
    return f"sigma_rel={sigma_rel_of(gamma):.4g}" if gamma > 0 else "gamma=0"


def _fit(
    steps: Sequence[float],
    gammas: Sequence[float],
    target_step: float,
    target_gamma: float,
    rounding: float,
) -> Fit:
    import torch

    # In units of the target's norm, and each profile divided by its own: the Gram matrix then is
    # one of cosines, whatever the steps.
    scale = math.sqrt(inner_product(target_step, target_gamma, target_step, target_gamma))
    norms = [
        math.sqrt(inner_product(t, g, t, g)) / scale for t, g in zip(steps, gammas, strict=True)
    ]
    inverse = 1 / torch.tensor(norms, dtype=torch.float64)
    gram = _cosines(steps, gammas, steps, gammas)
    aim = _cosines(steps, gammas, [target_step], [target_gamma])[:, 0]
    # Rounding errors add up as squares: rounding^2 * sum of squared weights. The second part is
    # the rounding of the matrix itself, below which it tells nothing.
    penalty = (rounding * inverse).square() + 16 * len(steps) * _EPSILON
    factor = cast("Tensor", torch.linalg.cholesky(gram + penalty.diag()))  # pyright: ignore[reportUnknownMemberType] -- untyped in torch
    free, toward_sum = torch.cholesky_solve(torch.stack([aim, inverse], 1), factor).unbind(1)
    shares = free + toward_sum * (1 - inverse @ free) / (inverse @ toward_sum)
    distance = 1 - 2 * (aim @ shares) + shares @ gram @ shares
    noise = (rounding * inverse * shares).square().sum()
    error = (distance.clamp(min=0) + noise).sqrt()
    return Fit([float(weight) for weight in inverse * shares], float(error))


def _cosines(
    steps_a: Sequence[float],
    gammas_a: Sequence[float],
    steps_b: Sequence[float],
    gammas_b: Sequence[float],
) -> Tensor:
    """Inner products of profiles divided by their norms, shape `(len(steps_a), len(steps_b))`, float64.

    That is `sqrt((2a+1)(2b+1)) / (a+b+1) * (t/u)^(b+1/2)` for t <= u.
    """
    import torch

    t = torch.tensor(steps_a, dtype=torch.float64)[:, None]
    u = torch.tensor(steps_b, dtype=torch.float64)[None, :]
    a = torch.tensor(gammas_a, dtype=torch.float64)[:, None]
    b = torch.tensor(gammas_b, dtype=torch.float64)[None, :]
    alike = ((2 * a + 1) * (2 * b + 1)).sqrt() / (a + b + 1)
    # By way of the gap: t/u itself is rounded, and the power of a narrow profile magnifies that.
    shrinking = torch.log1p(-(t - u).abs() / torch.maximum(t, u))
    return alike * torch.exp((torch.where(t <= u, b, a) + 0.5) * shrinking)


def _check_snapshots(steps: Sequence[float], gammas: Sequence[float]) -> None:
    if len(steps) != len(gammas):
        raise ValueError(
            f"there are {len(steps)} steps and {len(gammas)} gammas; each snapshot has one of both"
        )
    if not steps:
        raise ValueError("there is no snapshot to reconstruct from; give at least one")
    seen: set[tuple[float, float]] = set()
    for step, gamma in zip(steps, gammas, strict=True):
        _check_profile(step, gamma)
        if (step, gamma) in seen:
            raise ValueError(
                f"the snapshot of step {step:g} with gamma={gamma!r} is given twice; keep one"
            )
        seen.add((step, gamma))


def _check_profile(step: float, gamma: float) -> None:
    if not 0 < step < math.inf:
        raise ValueError(f"a profile cannot end at step {step!r}; steps are counted from 1")
    _check_gamma(gamma)


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(
            f"a profile cannot have gamma={gamma!r}; it is at least 0 (the plain mean) and finite"
        )
