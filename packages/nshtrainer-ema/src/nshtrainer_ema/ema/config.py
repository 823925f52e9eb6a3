"""Configuration of the exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.errors import ConfigError
from nshtrainer.types import Fraction, PositiveInt

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["EMACallbackConfig"]


@callback_registry.register
class EMACallbackConfig(CallbackConfigBase):
    """Keeps an exponential moving average of the trained weights and evaluates with it."""

    name: Literal["ema"] = "ema"

    decay: Fraction
    """How much of the average stays at each update: `average = decay*average + (1-decay)*weights`.
    1 never moves it, 0 follows the weights. The half-life is `log(0.5)/log(decay)` updates."""

    every_n_steps: PositiveInt = 1
    """Update at every so many optimizer steps; skipped steps do not count."""

    validate_original_weights: bool = False
    """Evaluate with the trained weights instead of the average; checkpoints then hold those as the
    model too, and the average beside them."""

    cpu_offload: bool = False
    """Keep the average in main memory: saves device memory and costs a copy at each update."""

    @staticmethod
    def check_alone(configs: Iterable[CallbackConfigBase]) -> None:
        """Refuse a second average of one run, unless it gives way by `ignore_if_exists`.

        Raises:
            ConfigError: There are several.
        """
        averages = [c for c in configs if isinstance(c, EMACallbackConfig)]
        if len([c for c in averages if not c.metadata.ignore_if_exists]) > 1:
            raise ConfigError(
                f"the run has {len(averages)} configurations of 'ema', and a module can be evaluated "
                "with one average only; keep one of them."
            )

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        self.check_alone(trainer_config.callbacks)
        from .callback import EMACallback

        yield EMACallback(self)
