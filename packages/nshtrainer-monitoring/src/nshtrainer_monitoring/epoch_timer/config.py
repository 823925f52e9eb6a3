"""Configuration of the epoch timer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["EpochTimerCallbackConfig"]


@callback_registry.register
class EpochTimerCallbackConfig(CallbackConfigBase):
    """Logs the seconds that epochs take, of the slowest rank: `{stage}/epoch_time_s`.

    Stages are `train`, `val`, `test` and `predict`. Validations inside a training epoch count for
    `val` only. An epoch that was resumed counts what it had taken before. While training, the parts
    of a step, the throughput and the time left are logged too, at the steps that Lightning logs, as
    means since the last such step on rank zero; other steps pay a few readings of a clock.
    """

    name: Literal["epoch_timer"] = "epoch_timer"

    log_step_times: bool = True
    """Log the seconds per batch as `train/batch_time_s`, and its parts, which add up to it:
    `train/data_time_s` (waiting for the loader), `forward`, `backward`, `optimizer`, `callbacks`
    and `other`. On a GPU these are the times of the host; see `synchronize_device`."""

    log_throughput: bool = True
    """Log `train/batches_per_s` of a rank, and `train/samples_per_s` of all ranks. A batch has as
    many samples as its first tensor has rows; one without a tensor leaves the latter out."""

    log_eta: bool = True
    """Log `train/eta_s`, the seconds until `max_epochs`, `max_steps` or `max_time` at the recent
    pace, validations included; left out where the end cannot be foreseen."""

    synchronize_device: bool = False
    """Wait for the device at each boundary between two parts of a step, so that its work counts for
    the part that asked for it. Slows training down: for a diagnosis, not for good."""

    prog_bar: bool = False
    """Show `train/samples_per_s` and `train/eta_s` in the progress bar too, as far as they are logged."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        from .callback import EpochTimerCallback

        yield EpochTimerCallback(self)
