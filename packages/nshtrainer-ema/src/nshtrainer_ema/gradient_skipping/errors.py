"""What gradient skipping stops a run with."""

from __future__ import annotations

from nshtrainer.errors import NshTrainerError

__all__ = ["ConsecutiveSkipsError", "GradientSpikeError"]


class GradientSpikeError(NshTrainerError, RuntimeError):
    """A gradient norm is too large, and `action` is `raise`; the weights are those before the step."""


class ConsecutiveSkipsError(NshTrainerError, RuntimeError):
    """As many steps in a row as `max_consecutive` were left out."""
