"""Training dynamics: weight averaging, gradient skipping, shared parameters, early stopping.

The configurations cost no torch; the callbacks import Lightning when they are first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .early_stopping.config import EarlyStoppingCallbackConfig
from .ema.config import EMACallbackConfig
from .gradient_skipping.config import GradientSkippingCallbackConfig
from .shared_parameters.config import SharedParametersCallbackConfig

if TYPE_CHECKING:
    from .early_stopping.callback import EarlyStoppingCallback
    from .ema.callback import EMACallback
    from .ema.weight_ema import WeightEMA
    from .gradient_skipping.callback import GradientSkippingCallback
    from .gradient_skipping.errors import ConsecutiveSkipsError, GradientSpikeError
    from .shared_parameters.callback import SharedParametersCallback

__all__ = [
    "ConsecutiveSkipsError",
    "EMACallback",
    "EMACallbackConfig",
    "EarlyStoppingCallback",
    "EarlyStoppingCallbackConfig",
    "GradientSkippingCallback",
    "GradientSkippingCallbackConfig",
    "GradientSpikeError",
    "SharedParametersCallback",
    "SharedParametersCallbackConfig",
    "WeightEMA",
]

_RUN_TIME = {
    "ConsecutiveSkipsError": ".gradient_skipping.errors",
    "GradientSpikeError": ".gradient_skipping.errors",
    "EMACallback": ".ema.callback",
    "EarlyStoppingCallback": ".early_stopping.callback",
    "GradientSkippingCallback": ".gradient_skipping.callback",
    "SharedParametersCallback": ".shared_parameters.callback",
    "WeightEMA": ".ema.weight_ema",
}


def __getattr__(name: str) -> Any:
    if name in _RUN_TIME:
        return getattr(import_module(_RUN_TIME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
