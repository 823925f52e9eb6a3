"""Callbacks for a plain Lightning trainer, read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from nshtrainer.config_files import describe, format_of, load_data, read_text
from nshtrainer.errors import ConfigFileError
from nshtrainer.trainer.config import SLOTS, TrainerConfig

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["callbacks_from_file"]


def callbacks_from_file(path: str | Path, source: str | None = None) -> list[Callback]:
    """The callbacks that *path* describes: a list of them, or a mapping as for `TrainerConfig`.

    Slots that are on by default are off unless the file names them.

    Args:
        path: A YAML, JSON or TOML file.
        source: What to call it in errors; None is the path.

    Raises:
        nshtrainer.errors.ConfigFileError: The file is missing or not valid.
    """
    from .assembly import resolve_callbacks

    path, source = Path(path), source or str(path)
    format_, text = format_of(path), read_text(path)
    data: Any = load_data(text, format_, source=source)
    if not isinstance(data, (list, dict)):
        raise ConfigFileError(f"{source}: a list of callbacks, or a mapping, is expected")
    is_list = isinstance(data, list)
    fields = cast("dict[str, Any]", {"callbacks": data} if is_list else data)
    fields.pop("$schema", None)
    try:
        config = TrainerConfig.model_validate({**dict.fromkeys(SLOTS), "loggers": [], **fields})
    except ValidationError as error:
        located = "" if is_list else text
        raise ConfigFileError(describe(error, source, located, format_)) from error
    return resolve_callbacks(config, copy=False)
