"""Configuration of the callback that uploads the source code to Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import PositiveInt

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["PathGlob", "WandbUploadCodeCallbackConfig"]

PathGlob = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A pattern of paths: `*` and `?` match any characters, `/` included; one without `/` is compared
with each part of the path, so that `data` stands for everything below any folder of that name."""


@callback_registry.register
class WandbUploadCodeCallbackConfig(CallbackConfigBase):
    """Uploads the source code of a run to Weights & Biases, once, when the run starts.

    In a git repository: what git tracks, and source files that it neither tracks nor ignores.
    Elsewhere: source files, without hidden folders, environments and caches. Files that look like
    secrets, by their name (`.env`) or by what is in them (keys, tokens, passwords), are never uploaded;
    they are named in the log, and by `nshtrainer wandb code`. Needs a W&B logger.
    """

    name: Literal["wandb_upload_code"] = "wandb_upload_code"

    enabled: bool = True
    """Whether the callback is used."""

    directory: Path | None = None
    """What is uploaded; None is the root of the git repository around the current directory, or the
    current directory if there is none."""

    include: list[PathGlob] | None = None
    """Upload the files that match one of these, whatever their kind; what git ignores stays out."""

    exclude: list[PathGlob] = Field(default_factory=list[PathGlob])
    """Leave out the files that match one of these."""

    max_file_bytes: PositiveInt = 1_000_000
    """Larger files are left out."""

    max_total_bytes: PositiveInt = 50_000_000
    """When the files are larger together, the largest ones are left out."""

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        if self.enabled:
            from .callback import WandbUploadCodeCallback

            yield WandbUploadCodeCallback(self)
