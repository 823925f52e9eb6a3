"""The decay at each step: constant, warmed up, or by the power function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .options import AverageOptions
from .power_function import gamma_of

__all__ = ["DecaySchedule", "profile_label", "schedules_of"]

Number: TypeAlias = "int | float | Tensor"


def schedules_of(options: AverageOptions) -> dict[str, DecaySchedule]:
    """The schedule of each average by its label; the first one is that of the evaluated average."""
    return dict(_schedules(options))


def profile_label(sigma_rel: float) -> str:
    """The label of the average by the power function of this width."""
    return f"sigma_rel={sigma_rel}"


def _schedules(options: AverageOptions) -> Iterator[tuple[str, DecaySchedule]]:
    if options.half_life_samples is not None:
        yield "average", DecaySchedule(options, half_life_samples=options.half_life_samples)
    elif options.half_life_steps is not None:
        yield "average", DecaySchedule(options, decay=0.5 ** (1 / options.half_life_steps))
    elif options.decay is not None:
        yield "average", DecaySchedule(options, decay=options.decay)
    for decay in options.extra_decays:
        yield f"decay={decay}", DecaySchedule(options, decay=decay)
    for sigma_rel in options.profiles:
        yield profile_label(sigma_rel), DecaySchedule(options, gamma=gamma_of(sigma_rel))


@dataclass(frozen=True)
class DecaySchedule:
    """The decay of one average.

    Args:
        options: Warm-up, start and interval.
        decay: Of one step.
        half_life_samples: In its place: samples after which half is left.
        gamma: In its place: exponent of the power function.
    """

    options: AverageOptions
    decay: float | None = None
    half_life_samples: float | None = None
    gamma: float | None = None

    @property
    def is_constant(self) -> bool:
        """Whether every update has the same decay."""
        return self.decay is not None and not self.options.warmup and not self.options.start_step

    def of_update(
        self, step: int | Tensor, samples: float | Tensor | None = None
    ) -> float | Tensor:
        """The decay of the update after optimizer step *step*, for all steps since the last one.

        Args:
            step: Steps applied so far, this one included; a 0-dim tensor where only the device
                knows, and then so is the result.
            samples: In the steps since the last update, of all ranks.
        """
        every = self.options.every_n_steps
        base = self._base(every, samples)
        if self.is_constant:
            return base**every
        count = _real(step) - self.options.start_step
        if self.gamma is not None:
            # The product over the steps, in closed form.
            return _at_least(1 - every / _at_least(count, every), 0) ** (self.gamma + 1)
        decay: Number = 1.0
        for before in range(every):
            # A product of factors, so that an interval gives what single updates would.
            n = count - before
            decay = decay * _where_positive(n, self._at(_at_least(n, 1), base))
        return decay

    def _base(self, every: int, samples: float | Tensor | None) -> float | Tensor:
        if self.decay is not None:
            return self.decay
        if self.half_life_samples is None:
            return 1.0
        if samples is None:
            raise ValueError("a half-life in samples needs the number of samples at each update")
        return 0.5 ** (samples / (every * self.half_life_samples))

    def _at(self, n: float | Tensor, decay: float | Tensor) -> float | Tensor:
        options = self.options
        match options.warmup:
            case None:
                return decay
            case "inverse_power":
                ramp = 1 - (1 + (n - 1) / options.warmup_inv_gamma) ** -options.warmup_power
            case "tensorflow":
                ramp = (1 + n) / (10 + n)
            case "half_life":
                ramp = 0.5 ** (1 / (options.warmup_ratio * n))
            case "linear":
                ramp = decay * n / (options.warmup_steps or 1)
            case "bias_correction":
                return _bias_corrected(n, decay)
        return _at_most(ramp, decay)


def _bias_corrected(n: float | Tensor, decay: float | Tensor) -> float | Tensor:
    if isinstance(n, Tensor) or isinstance(decay, Tensor):
        n, decay = torch.as_tensor(n), torch.as_tensor(decay)
        rate = torch.log(decay.double())
        weights = decay * torch.expm1((n - 1) * rate) / torch.expm1(n * rate)
        return torch.where(decay == 1, (n - 1) / n, torch.where(decay == 0, 0.0, weights))
    if decay in (0.0, 1.0):
        return decay * (n - 1) / n  # the limit at 1: the plain mean
    rate = math.log(decay)
    return decay * math.expm1((n - 1) * rate) / math.expm1(n * rate)


def _real(step: int | Tensor) -> float | Tensor:
    if not isinstance(step, Tensor):
        return float(step)
    return step.to(torch.float32 if step.device.type == "mps" else torch.float64)


def _at_least(value: float | Tensor, least: float) -> float | Tensor:
    return value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)


def _at_most(value: float | Tensor, most: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor) or isinstance(most, Tensor):
        return torch.minimum(torch.as_tensor(value), torch.as_tensor(most))
    return min(value, most)


def _where_positive(n: float | Tensor, value: float | Tensor) -> float | Tensor:
    """*value* where *n* is above 0, else 0: until `start_step` the average follows the weights."""
    if isinstance(n, Tensor):
        return torch.where(n > 0, value, 0.0)
    return value if n > 0 else 0.0
