"""Callbacks for a plain Lightning trainer, read from a file."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nshtrainer.config_files import describe, format_of, load_data, read_text, validated
from nshtrainer.errors import ConfigError, ConfigFileError
from nshtrainer.trainer.config import SLOTS, TrainerConfig

from .base import metadata_of

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["callbacks_from_file"]


def callbacks_from_file(path: str | Path, source: str | None = None) -> list[Callback]:
    """The callbacks that *path* describes: a list of them, or a mapping as for `TrainerConfig`.

    Slots that are on by default are off unless the file names them. An item of the list may be a
    name alone.

    Args:
        path: A YAML, JSON or TOML file.
        source: What to call it in errors; None is the path.

    Raises:
        nshtrainer.errors.ConfigFileError: The file is missing or not valid.
        nshtrainer.errors.ConfigError: Called while Lightning builds a trainer, and that has one of them.
    """
    from .assembly import resolve_callbacks

    path, source = Path(path), source or str(path)
    format_, text = format_of(path, source), read_text(path, source)
    data: Any = load_data(text, format_, source=source)
    if not isinstance(data, (list, dict)):
        raise ConfigFileError(f"{source}: a list of callbacks, or a mapping, is expected")
    top = "callbacks" if isinstance(data, list) else ""
    fields = cast("dict[str, Any]", {top: data} if top else data)
    fields.pop("$schema", None)
    if isinstance(items := fields.get("callbacks"), list):
        named = cast("list[Any]", items)
        fields["callbacks"] = [{"name": c} if isinstance(c, str) else c for c in named]
    config = validated(
        TrainerConfig,
        {**dict.fromkeys(SLOTS), "loggers": [], **fields},
        lambda error: describe(error, source, text, format_, top=top),
        source,
    )
    return _beside(resolve_callbacks(config, copy=False), _callbacks_of_caller(), source)


def _callbacks_of_caller() -> list[Callback]:
    """The callbacks that the script gave to the trainer that Lightning is building just now.

    Lightning tells a factory nothing, so they are looked up in the frame that asked for it; nothing
    is found where Lightning is built differently, and then its own check has the last word.
    """
    frame = inspect.currentframe()
    while frame is not None and (frame := frame.f_back) is not None:
        connector = frame.f_locals.get("self")
        if type(connector).__name__ == "_CallbackConnector":
            return list(getattr(getattr(connector, "trainer", None), "callbacks", ()))
    return []


def _beside(mine: list[Callback], scripts: list[Callback], source: str) -> list[Callback]:
    """*mine* without those that give way to one of the script's.

    Raises:
        ConfigError: The script has one of them too.
    """
    from lightning.pytorch.callbacks import Callback

    theirs = {c.state_key: c for c in scripts}
    kept: list[Callback] = []
    for callback in mine:
        other = theirs.get(key := callback.state_key)
        keeps_state = type(callback).state_dict is not Callback.state_dict
        if other is None or not (keeps_state or key.startswith("nshtrainer.")):
            kept.append(callback)
        elif not (metadata := metadata_of(callback)) or not metadata.ignore_if_exists:
            raise ConfigError(
                f"{source} and the script's own Trainer(callbacks=...) give the same callback twice "
                f"({type(other).__name__}, {key}); remove one, or tell them apart with different `label`s"
            )
    return kept
