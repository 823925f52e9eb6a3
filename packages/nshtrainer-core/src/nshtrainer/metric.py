"""`MetricConfig`: the name of a logged metric and the direction in which it gets better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import AliasChoices, Field

from .config import Config
from .types import MetricName

__all__ = ["MetricConfig"]


class MetricConfig(Config):
    """A metric that something waits for: a best checkpoint, early stopping, a check."""

    name: MetricName = Field(validation_alias=AliasChoices("name", "monitor"))
    """Name under which the metric is logged (`self.log(name, ...)`); `monitor` is accepted too."""

    mode: Literal["min", "max"]
    """Whether lower (`min`) or higher (`max`) is better."""

    @property
    def monitor(self) -> str:
        """The name, in Lightning's word."""
        return self.name

    @property
    def worst(self) -> float:
        """The value that every other finite one beats."""
        return math.inf if self.mode == "min" else -math.inf

    def is_better(self, new: float | None, old: float | None) -> bool:
        """Whether *new* beats *old*; None and NaN are worse than any number, and never better."""
        if new is None or math.isnan(new):
            return False
        if old is None or math.isnan(old):
            return True
        return new < old if self.mode == "min" else new > old

    def best(self, values: Iterable[float | None]) -> float | None:
        """The best of *values*, the first one among equals; None if none of them is a number."""
        best: float | None = None
        for value in values:
            if self.is_better(value, best):
                best = value
        return best
