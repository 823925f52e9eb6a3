"""How the weights are averaged: the options that the callback and the plain class share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from nshtrainer.config import Config
from nshtrainer.types import Fraction, Glob, NonNegativeInt, PositiveFloat, PositiveInt

__all__ = ["AverageOptions", "Buffers", "Warmup"]

Warmup = Literal["inverse_power", "bias_correction", "half_life", "tensorflow", "linear"]
Buffers = Literal["copy", "average", "keep"]
RelativeWidth = Annotated[PositiveFloat, Field(lt=12**-0.5)]

_OF_WARMUP: dict[str, str] = {
    "warmup_power": "inverse_power",
    "warmup_inv_gamma": "inverse_power",
    "warmup_ratio": "half_life",
    "warmup_steps": "linear",
}


class AverageOptions(Config, defer_build=True):
    """Which tensors are averaged, how fast the average moves, and where it is kept.

    One of `decay`, `half_life_steps`, `half_life_samples` and `profiles` is needed.
    """

    decay: Fraction | None = None
    """How much of the average stays at each optimizer step: `average = decay*average +
    (1-decay)*weights`. 1 never moves it, 0 follows the weights."""

    half_life_steps: PositiveFloat | None = None
    """The decay said in another way: after so many optimizer steps the weights of today count half.
    `decay = 0.5**(1/half_life_steps)`."""

    half_life_samples: PositiveFloat | None = None
    """The same in samples of all ranks: the decay follows the batch size, accumulation and the
    number of ranks, `decay = 0.5**(samples of the step/half_life_samples)`."""

    every_n_steps: PositiveInt = 1
    """Update at every so many optimizer steps, by as much as that many updates would; skipped steps
    do not count."""

    start_step: NonNegativeInt = 0
    """The average follows the weights for so many optimizer steps, and begins then."""

    warmup: Warmup | None = None
    """How the decay rises to its value, by n = 1, 2, ... optimizer steps since `start_step`; never
    above it.

    `inverse_power`: `1 - (1 + (n-1)/warmup_inv_gamma)**-warmup_power`; with a power of 1, the plain
    mean of all weights. Source: K. Crowson's k-diffusion, `EMAWarmup`.
    `bias_correction`: as an average that begins at 0, divided by `1 - decay**n`. Source: Kingma and
    Ba 2014, https://arxiv.org/abs/1412.6980, section 3.
    `half_life`: the half-life is at most `warmup_ratio*n`. Source: Karras et al. 2022, EDM,
    https://arxiv.org/abs/2206.00364, training code.
    `tensorflow`: `(1+n)/(10+n)`. Source: TensorFlow's `ExponentialMovingAverage`, `num_updates`.
    `linear`: `decay*n/warmup_steps`.
    """

    warmup_power: PositiveFloat = 2 / 3
    """Of `warmup="inverse_power"`: 2/3 for a million steps and more, 3/4 for fewer."""

    warmup_inv_gamma: PositiveFloat = 1.0
    """Of `warmup="inverse_power"`: how many steps pass until the decay begins to rise in earnest."""

    warmup_ratio: PositiveFloat = 0.05
    """Of `warmup="half_life"`: the half-life's largest share of the steps made."""

    warmup_steps: PositiveInt | None = None
    """Of `warmup="linear"`: the number of steps until the decay has its value."""

    buffers: Buffers = "keep"
    """What is evaluated in the place of the module's persistent buffers.

    `keep`: the buffers as they are at that moment; nothing of them is kept.
    `copy`: a copy made at each update of the average.
    `average`: their average, made as that of the weights; of buffers that are no floating-point
    numbers, of the vectors of spectral norm and of those with an Inf or NaN in them, a copy.

    What evaluation writes into a copied or averaged buffer is gone after it.
    """

    include: list[Glob] | None = None
    """Average only parameters and buffers whose names match one of these globs, such as
    `encoder.*`; None is all."""

    exclude: list[Glob] = Field(default_factory=list[Glob])
    """Leave out those whose names match one of these globs; evaluation uses them as they are."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Of the average; None is that of the weights, but float32 for those with fewer bits: a bfloat16
    average with a decay of 0.999 never moves."""

    cpu_offload: bool = False
    """Keep the average in main memory: saves device memory and costs a copy at each update."""

    extra_decays: list[Fraction] = Field(default_factory=list[Fraction])
    """Further averages with these decays and the same other options, kept and saved beside the one
    that is evaluated."""

    profiles: list[RelativeWidth] = Field(default_factory=list[RelativeWidth])
    """Further averages by the power function: relative widths (`sigma_rel`), such as 0.05 and 0.1.
    From their snapshots, `nshtrainer ema reconstruct` makes the average of any other width after
    training. Without a decay or half-life, the first of them is the one that is evaluated.
    Source: Karras et al. 2024, https://arxiv.org/abs/2312.02696, section 3."""

    @model_validator(mode="after")
    def _say_one_decay(self) -> Self:
        ways = ("decay", "half_life_steps", "half_life_samples")
        given = [way for way in ways if getattr(self, way) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same in different ways; give one")
        if not given and not self.profiles:
            raise ValueError(
                "nothing says how fast the average moves; give `decay`, for example 0.999, or one of "
                "`half_life_steps`, `half_life_samples` and `profiles`"
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup == "linear" and self.warmup_steps is None:
            raise ValueError("warmup='linear' needs `warmup_steps`, the length of the ramp")
        for option, formula in _OF_WARMUP.items():
            default = type(self).model_fields[option].default
            if getattr(self, option) != default and self.warmup != formula:
                raise ValueError(
                    f"`{option}` belongs to warmup={formula!r}, and warmup is {self.warmup!r}; "
                    "set both, or neither"
                )
        return self

    @model_validator(mode="after")
    def _name_each_once(self) -> Self:
        for option in ("extra_decays", "profiles"):
            values: list[float] = getattr(self, option)
            if len(set(values)) < len(values) or (
                option == "extra_decays" and self.decay in values
            ):
                raise ValueError(f"`{option}` has one value twice; each makes one average")
        return self
