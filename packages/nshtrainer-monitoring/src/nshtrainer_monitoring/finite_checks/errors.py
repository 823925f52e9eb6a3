"""What the finite checks raise."""

from __future__ import annotations

from nshtrainer.errors import NshTrainerError

__all__ = [
    "MissingGradientError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "NonFiniteParameterError",
]


class NonFiniteLossError(NshTrainerError, FloatingPointError):
    """A loss is NaN or infinite; no weight was changed by it."""


class NonFiniteGradientError(NshTrainerError, FloatingPointError):
    """A gradient is NaN or infinite; no weight was changed by it."""


class NonFiniteParameterError(NshTrainerError, FloatingPointError):
    """A parameter is NaN or infinite."""


class MissingGradientError(NshTrainerError, RuntimeError):
    """A trainable parameter has no gradient; the step was not made."""
