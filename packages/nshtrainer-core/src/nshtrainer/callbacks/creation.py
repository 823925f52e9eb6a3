"""Asks a configuration for its callbacks, and checks what it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import Callback
from pydantic import BaseModel

from nshtrainer.errors import PluginContractError

if TYPE_CHECKING:
    from nshtrainer.trainer.config import TrainerConfig

    from .base import CallbackConfigBase

__all__ = ["created"]


def created(config: CallbackConfigBase, trainer_config: TrainerConfig) -> Iterator[Callback]:
    """What *config* creates, each checked: users' classes need not be type-checked.

    Raises:
        PluginContractError: It is something else than callbacks, or `sys.exit` was called.
    """
    what = f"{type(config).__module__}.{type(config).__qualname__}.create_callbacks"
    try:
        made: Any = config.create_callbacks(trainer_config)
        if isinstance(made, (Callback, BaseModel)) or not isinstance(made, Iterable):
            raise PluginContractError(
                f"{what} returned {_told(made)}, not several callbacks; `yield` each of them, "
                f"or return a list (an empty one for none)"
            )
        for callback in cast("Iterable[Any]", made):
            if not isinstance(callback, Callback):
                raise PluginContractError(
                    f"{what} gave {_told(callback)}, which is no callback of lightning.pytorch; "
                    f"`yield` the callback itself, and nothing where there is none"
                )
            yield callback
    except SystemExit as error:
        raise PluginContractError(
            f"{what} tried to end the program ({error!r}); raise an error that says what is wrong"
        ) from error


def _told(value: object) -> str:
    return "None" if value is None else f"{value!r:.80} ({type(value).__qualname__})"
