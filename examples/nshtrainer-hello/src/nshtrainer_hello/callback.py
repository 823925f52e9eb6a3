"""The callback `hello`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer import ConfiguredCallback

from .config import HelloCallbackConfig


class HelloCallback(ConfiguredCallback[HelloCallbackConfig]):
    """Prints a greeting; `HelloCallback(greeting="Hi")` works without a configuration too."""

    config_class = HelloCallbackConfig

    def __init__(self, config: HelloCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.num_greetings = 0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch % self.config.every_n_epochs == 0:
            self.num_greetings += 1
            if trainer.is_global_zero:
                print(f"{self.config.greeting}, epoch {trainer.current_epoch}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_greetings": self.num_greetings}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_greetings = state_dict["num_greetings"]
