"""Configuration of the exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator
from typing_extensions import Self, override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.errors import ConfigError
from nshtrainer.types import PositiveInt

from .options import AverageOptions

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["EMACallbackConfig"]


@callback_registry.register
class EMACallbackConfig(CallbackConfigBase, AverageOptions, defer_build=False):
    """Keeps an exponential moving average of the trained weights and evaluates with it."""

    name: Literal["ema"] = "ema"

    validate_original_weights: bool = False
    """Evaluate with the trained weights instead of the average; checkpoints then hold those as the
    model too, and the average beside them."""

    validate_both: bool = False
    """In a fit, validate a second time with the other set of weights. What validation logs keeps its
    name for the set that is evaluated, and is logged again as `ema/<name>` and `raw/<name>`."""

    average_after_fit: bool = False
    """Let the module hold the average when a fit has ended as it should, as Lightning's
    `WeightAveraging` does; the weights as trained are then in the checkpoints only."""

    snapshot_every_n_steps: PositiveInt | None = None
    """Write the averages of `profiles` to a file at every so many optimizer steps and at the end of
    training; None writes none."""

    snapshot_dir: Path | None = None
    """Where to; None is the folder `ema` of the run."""

    @model_validator(mode="after")
    def _check_snapshots(self) -> Self:
        if self.snapshot_every_n_steps is not None and not self.profiles:
            raise ValueError(
                "`snapshot_every_n_steps` writes the averages of `profiles`, and there are none; set "
                "`profiles`, for example [0.05, 0.1]"
            )
        return self

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
                "with one average only; keep one of them. For averages with other decays beside it, "
                "set `extra_decays`."
            )

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        self.check_alone(trainer_config.callbacks)
        from .callback import EMACallback

        yield EMACallback(self, run=trainer_config.run)
