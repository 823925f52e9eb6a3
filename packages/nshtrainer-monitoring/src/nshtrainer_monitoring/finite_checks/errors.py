"""What the gradient checks raise."""

from __future__ import annotations

from nshtrainer.errors import NshTrainerError

__all__ = ["MissingGradientError", "NonFiniteGradientError"]


class NonFiniteGradientError(NshTrainerError, FloatingPointError):
    """A gradient is NaN or infinite; no weight was changed by it."""


class MissingGradientError(NshTrainerError, RuntimeError):
    """A trainable parameter has no gradient; the step was not made."""
