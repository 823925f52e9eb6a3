"""Which of the checkpoints in a folder lie on the way of the present training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["Lineage"]


@dataclass(frozen=True)
class Lineage:
    """The attempts that led to the present one, each up to the step where it was left.

    Training that starts from scratch is a new attempt, and so is one that goes back to an earlier
    checkpoint. Checkpoints of other attempts, or beyond the step where an attempt was left, are
    neither compared with nor deleted. A later attempt is newer than an earlier one.
    """

    attempt: int
    """Counts from 1 within a run."""
    ancestors: tuple[tuple[int, int], ...] = ()
    """Attempt and last step of each, oldest first."""

    def includes(self, attempt: int, step: int) -> bool:
        """Whether the checkpoint of *attempt* at *step* lies on the way."""
        return attempt == self.attempt or any(a == attempt and step <= s for a, s in self.ancestors)

    @classmethod
    def fresh(cls, present: Iterable[tuple[int, int]]) -> Lineage:
        """Start from scratch beside the checkpoints *present*: pairs of attempt and step."""
        return cls(1 + max((attempt for attempt, _ in present), default=0))

    def resumed(self, step: int, present: Iterable[tuple[int, int]]) -> Lineage:
        """Go on from *step*: the same attempt if nothing newer is present, else a new one."""
        pairs = list(present)
        if all((attempt, at) <= (self.attempt, step) for attempt, at in pairs):
            return self
        return Lineage(Lineage.fresh(pairs).attempt, (*self.ancestors, (self.attempt, step)))

    def to_state(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"attempt": self.attempt, "ancestors": [list(a) for a in self.ancestors]}

    @classmethod
    def from_state(cls, state: Any) -> Lineage | None:
        """Read what `to_state` made; None for anything else."""
        try:
            pairs = cast("list[tuple[Any, Any]]", state["ancestors"])
            return cls(int(state["attempt"]), tuple((int(a), int(s)) for a, s in pairs))
        except (KeyError, TypeError, ValueError):
            return None
