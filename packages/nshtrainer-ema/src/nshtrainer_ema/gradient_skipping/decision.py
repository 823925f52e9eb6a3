"""What was decided about one step, and the counts and streaks that come of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Decision", "Streak"]


@dataclass(frozen=True)
class Decision:
    """The first decision of one attempt of an optimizer; 0-dim tensors on the device."""

    norm: Tensor
    limit: float | Tensor
    """The largest norm that is not too large."""
    counts: Tensor | None
    """Whether the norm belongs into the statistics; `None` without any."""
    left_out: bool | Tensor = False
    """Whether the step is left out, as far as this callback is concerned."""
    clipped: Tensor | None = None
    """Whether the gradients were scaled down; `None` if they never are."""


class Streak:
    """How many steps in a row were left out, and the most since `take` was called.

    Args:
        length: Steps in a row up to now.
        longest: The longest streak not yet taken.
    """

    def __init__(self, length: int = 0, longest: int = 0) -> None:
        self._length: int | Tensor = length
        self._longest: int | Tensor = longest

    def add(self, left_out: bool | Tensor) -> None:
        """Count one step; the host waits only for what it was told by a tensor before."""
        if isinstance(left_out, Tensor):
            self._length = torch.where(left_out, self._length + 1, 0)
            longest = torch.as_tensor(self._longest, device=left_out.device)
            self._longest = torch.maximum(longest, self._length)
        else:
            self._length = int(self._length) + 1 if left_out else 0
            self._longest = max(int(self._longest), self._length)

    def is_known(self) -> bool:
        """Whether the host knows the longest streak without waiting for the device."""
        return not isinstance(self._longest, Tensor)

    def take(self) -> int:
        """Return the longest streak since the last call; may wait for the device."""
        longest = int(self._longest)
        self._longest = self._length
        return longest

    def state(self) -> list[int]:
        """Return the constructor's arguments; may wait for the device."""
        return [int(self._length), int(self._longest)]
