"""What is wrong with the values of metrics, on this rank and between ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["describe_values", "find_disagreement", "find_wrong_value"]


def find_wrong_value(
    value: float, bounds: tuple[float | None, float | None] | None, *, finite: bool
) -> str | None:
    """Return what is wrong with *value*; None if nothing is.

    Args:
        value: The metric.
        bounds: Smallest and largest value, None for no bound. NaN is outside of any range.
        finite: Whether NaN and infinity are wrong.
    """
    if finite and not math.isfinite(value):
        return f"is {value}, and a finite number is expected"
    low, high = bounds or (None, None)
    outside = (low is not None and not value >= low) or (high is not None and not value <= high)
    if not outside:
        return None
    if low is None or high is None:
        return f"is {value:g}, and " + (
            f"at least {low:g} is expected" if low is not None else f"at most {high:g} is expected"
        )
    return f"is {value:g}, and a value from {low:g} to {high:g} is expected"


def find_disagreement(values: Sequence[float | None]) -> str | None:
    """Return how *values*, one for each rank, differ; None if they are the same.

    None stands for a metric that a rank has not logged. NaN equals NaN.
    """
    first = values[0]
    if all(_same(first, value) for value in values[1:]):
        return None
    texts = ("nothing" if value is None else f"{value:g}" for value in values)
    each = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
    return f"differs between ranks ({each})"


def describe_values(wrong: Mapping[str, str], *, when: str) -> str:
    """Return what happened, what was expected, and what to do.

    Args:
        wrong: What is wrong with each metric.
        when: The moment of the check.
    """
    lines = [f"{when}, {len(wrong)} metrics have values that are not allowed:"]
    lines += [f"  {name!r} {problem}" for name, problem in wrong.items()]
    if any(problem.startswith("differs") for problem in wrong.values()):
        lines.append("Log what differs with self.log(..., sync_dist=True), on every rank.")
    lines.append(
        "Correct how they are computed, or what metric_validation's check_finite, ranges and "
        "check_ranks_agree ask for."
    )
    return "\n".join(lines)


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or (math.isnan(one) and math.isnan(other))
