"""The options of the callback `hello`; imports neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from nshtrainer import CallbackConfigBase, TrainerConfig
from nshtrainer.types import PositiveInt

if TYPE_CHECKING:
    from .callback import HelloCallback


class HelloCallbackConfig(CallbackConfigBase):
    """Says hello when an epoch of training starts, and counts how often it did."""

    name: Literal["hello"] = "hello"

    greeting: str = "Hello"
    """What to say before the number of the epoch."""

    every_n_epochs: PositiveInt = 1
    """Say it at the start of every n-th epoch only."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterator[HelloCallback]:
        from .callback import HelloCallback

        yield HelloCallback(self)
