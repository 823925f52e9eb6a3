"""Running statistics of gradient norms, and the limit that they set for the next one.

All of it stays on the device of the norms: an update selects with `torch.where` between old and new, so
that the host never has to know whether a norm counts. What does not count leaves every number
bitwise as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    from .config import GradientSkippingCallbackConfig

__all__ = [
    "MovingStatistics",
    "NormStatistics",
    "WindowPercentile",
    "WindowStatistics",
    "make_statistics",
]

_SMALLEST_WARMUP: Final = 20  # OLMo-core's, for short windows


class NormStatistics(ABC):
    """What is known of the gradient norms of one optimizer.

    Args:
        warmup: From how many norms on there is a limit.
    """

    excludes_spikes = True
    """Whether norms above the limit have to be kept out of `update`."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._tensors: dict[str, Tensor] = {}

    def limit(self, norm: Tensor) -> Tensor:
        """Return the largest norm that is no spike: 0-dim, on the device of *norm*, no host wait.

        Infinite until `warmup` norms have counted.
        """
        tensors = self._on(norm.device)
        limit = self._limit(tensors)
        return torch.where(tensors["count"] >= self._warmup, limit, torch.inf)

    def update(self, norm: Tensor, counts: Tensor) -> None:
        """Take *norm* in, 0-dim, where *counts* (0-dim bool) is set; no host wait."""
        tensors = self._on(norm.device)
        after = self._next(tensors, norm.to(_wide(norm.device)))
        self._tensors = {k: torch.where(counts, after[k], old) for k, old in tensors.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all tensors in main memory; empty before the first norm."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> bool:
        """Go on from *state*; false, and nothing done, if it is of other statistics."""
        expected = {k: t.shape for k, t in self._new(torch.device("cpu")).items()}
        if state and {k: t.shape for k, t in state.items()} != expected:
            return False
        self._tensors = {name: tensor.clone() for name, tensor in state.items()}
        return True

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        # A checkpoint is loaded before it is known which device will train.
        if not self._tensors:
            self._tensors = self._new(device)
        elif self._tensors["count"].device != device:
            wide = _wide(device)
            self._tensors = {
                k: t.to(device, wide if t.is_floating_point() else t.dtype)
                for k, t in self._tensors.items()
            }
        return self._tensors

    @abstractmethod
    def _new(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors, `count` among them, before any norm."""

    @abstractmethod
    def _limit(self, tensors: Mapping[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def _next(self, tensors: Mapping[str, Tensor], norm: Tensor) -> dict[str, Tensor]: ...


class MovingStatistics(NormStatistics):
    """`mean + sigmas * deviation`, both moving averages.

    Up to `warmup`, mean and variance are those of all norms (Welford 1962,
    https://doi.org/10.1080/00401706.1962.10490022), then `decay * old + (1 - decay) * new`, where the new
    variance is the squared distance from the new mean (ZClip, https://arxiv.org/abs/2504.02507).

    Args:
        sigmas: How many standard deviations.
        decay: In (0, 1); the half-life is `log(0.5) / log(decay)` norms.
        warmup: See `NormStatistics`.
    """

    def __init__(self, sigmas: float, decay: float, warmup: int) -> None:
        super().__init__(warmup)
        self._sigmas, self._decay = sigmas, decay

    @override
    def _new(self, device: torch.device) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=_wide(device), device=device)
        return {"count": zero.long(), "mean": zero, "variance": zero}

    @override
    def _limit(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["mean"] + self._sigmas * tensors["variance"].sqrt()

    @override
    def _next(self, tensors: Mapping[str, Tensor], norm: Tensor) -> dict[str, Tensor]:
        count = tensors["count"] + 1
        warms_up = count <= self._warmup
        weight = torch.where(warms_up, count.to(norm.dtype).reciprocal(), 1 - self._decay)
        before = norm - tensors["mean"]
        mean = tensors["mean"] + weight * before
        after = norm - mean
        square = torch.where(warms_up, before * after, after * after)
        variance = tensors["variance"] + weight * (square - tensors["variance"])
        return {"count": count, "mean": mean, "variance": variance}


class _Window(NormStatistics):
    """The latest norms, in a ring.

    Args:
        size: How many.
        warmup: See `NormStatistics`.
    """

    def __init__(self, size: int, warmup: int) -> None:
        super().__init__(warmup)
        self._size = size

    @override
    def _new(self, device: torch.device) -> dict[str, Tensor]:
        count = torch.zeros((), dtype=torch.int64, device=device)
        norms = torch.zeros(self._size, dtype=_wide(device), device=device)
        return {"count": count, "norms": norms}

    @override
    def _next(self, tensors: Mapping[str, Tensor], norm: Tensor) -> dict[str, Tensor]:
        count, norms = tensors["count"], tensors["norms"]
        place = torch.arange(self._size, device=norm.device) == count % self._size
        return {"count": count + 1, "norms": torch.where(place, norm, norms)}

    def _filled(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return how many norms there are (0-dim), and which places of the ring have one."""
        count = tensors["count"]
        return count.clamp(max=self._size), torch.arange(self._size, device=count.device) < count


class WindowStatistics(_Window):
    """`mean + sigmas * deviation` of the window, the deviation with Bessel's correction.

    Source: OLMo-core's SkipStepOptimizer, which lets spikes and NaN into its window and also skips
    what is unusually small; here they are kept out, and only large norms are spikes.

    Args:
        sigmas: How many standard deviations.
        size: Norms in the window.
        warmup: See `NormStatistics`.
    """

    def __init__(self, sigmas: float, size: int, warmup: int) -> None:
        super().__init__(size, warmup)
        self._sigmas = sigmas

    @override
    def _limit(self, tensors: Mapping[str, Tensor]) -> Tensor:
        number, filled = self._filled(tensors)
        norms = tensors["norms"]
        mean = norms.sum() / number.clamp(min=1)  # places without a norm are zero
        squares = torch.where(filled, norms - mean, 0.0).square().sum()
        return mean + self._sigmas * (squares / (number - 1).clamp(min=1)).sqrt()


class WindowPercentile(_Window):
    """A percentile of the window times a factor, interpolated linearly between two norms.

    Spikes are let in, as in AutoClip (Seetharaman et al. 2020, https://arxiv.org/abs/2007.14469):
    one moves a percentile by one rank, however large it is. If they were kept out, the percentile would
    be one of its own lower part, and fall step by step.

    Args:
        percentile: In (0, 100].
        factor: What it is multiplied by.
        size: Norms in the window.
        warmup: See `NormStatistics`.
    """

    excludes_spikes = False

    def __init__(self, percentile: float, factor: float, size: int, warmup: int) -> None:
        super().__init__(size, warmup)
        self._percentile, self._factor = percentile, factor

    @override
    def _limit(self, tensors: Mapping[str, Tensor]) -> Tensor:
        number, filled = self._filled(tensors)
        ranked = torch.where(filled, tensors["norms"], torch.inf).sort().values
        place = (number - 1).clamp(min=0).to(ranked.dtype) * (self._percentile / 100)
        below, above = place.floor(), place.ceil()
        # `take`, since an index of a 0-dim tensor makes the host wait.
        low, high = ranked.take(below.long()), ranked.take(above.long())
        return self._factor * torch.where(below == above, low, low + (high - low) * (place - below))


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of statistics: squares of large fp32 norms overflow, and would never leave a mean."""
    return torch.float32 if device.type == "mps" else torch.float64


def make_statistics(config: GradientSkippingCallbackConfig) -> NormStatistics | None:
    """Return new statistics as *config* describes them; None without a policy."""
    if config.policy == "zscore":
        return MovingStatistics(
            config.sigmas or 2.5, config.statistics_decay or 0.97, config.warmup_steps or 25
        )
    if config.policy == "sigma":
        window = config.window or 128
        warmup = config.warmup_steps or max(_SMALLEST_WARMUP, window // 2)
        return WindowStatistics(config.sigmas or 6.0, window, warmup)
    if config.policy == "percentile":
        return WindowPercentile(
            config.percentile or 100.0,
            config.percentile_factor or 1.0,
            config.window or 1000,
            config.warmup_steps or 100,
        )
    return None
