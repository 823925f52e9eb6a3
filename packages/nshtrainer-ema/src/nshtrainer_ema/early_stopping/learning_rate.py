"""Whether a learning rate has run out: it was above a floor once, and is no longer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LearningRateFloor", "largest_learning_rate"]


def largest_learning_rate(optimizers: Sequence[Optimizer]) -> float | None:
    """Return the largest learning rate of all parameter groups; None if there is none.

    Waits for the device where a rate is a tensor there.
    """
    groups: Iterable[dict[str, Any]] = (g for o in optimizers for g in o.param_groups)
    return max((float(group["lr"]) for group in groups if "lr" in group), default=None)


class LearningRateFloor:
    """Remembers whether the learning rate was ever above *floor*, so that warm-up does not count.

    Args:
        floor: The rate to come down to.
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self.was_above = False
        """Whether an observed rate was above the floor."""

    def is_reached(self, rate: float | None) -> bool:
        """Observe *rate*, and say whether it has come down to the floor; None is not observed."""
        if rate is None:
            return False
        if rate > self.floor:
            self.was_above = True
            return False
        return self.was_above
