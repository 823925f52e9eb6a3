"""Configuration of the callback that lets `nshutils.ActSave` store activations."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self, override

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.errors import PluginLoadError
from nshtrainer.types import Glob, Int, PositiveInt

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["ActSaveConfig", "Ranks", "Reducer", "require_nshutils"]

Reducer = Literal["mean", "l2_norm", "histogram"]
"""What is stored of a tensor: its mean, its L2 norm, or the counts and edges of a histogram."""


def _some_ranks(value: str | list[int]) -> str | list[int]:
    if not value or any(not isinstance(rank, str) and rank < 0 for rank in value):
        raise PydanticCustomError(
            "ranks", "at least one rank, and none below 0, is expected, or 'zero', or 'all'"
        )
    return value


Ranks = Annotated[Literal["zero", "all"] | list[Int], AfterValidator(_some_ranks)]
"""Processes of a run: the first, all, or those with these global ranks."""


@callback_registry.register
class ActSaveConfig(CallbackConfigBase):
    """Turns `nshutils.ActSave` on while the trainer runs, under the stage's name.

    What the model hands to `ActSave({...})` is stored below `train`, `validation`, `test` or `predict`,
    and so are the outputs of the submodules that `include` names. Needs the extra `actsave`.
    """

    name: Literal["act_save"] = "act_save"

    enabled: bool = True
    """Whether activations are stored; if not, nothing is imported and no folder is made."""

    save_dir: Path | None = None
    """Where to; None is `<run>/activation`."""

    include: list[Glob] = Field(default_factory=list[Glob])
    """Store the outputs of the submodules whose names match one of these, such as `encoder.*`; the
    model's code is not touched. Empty stores what the model hands to `ActSave` alone."""

    exclude: list[Glob] = Field(default_factory=list[Glob])
    """Leave out the submodules whose names match one of these."""

    reduce: list[Reducer] = Field(default_factory=list[Reducer])
    """What is stored of a submodule's output, reduced on its device; empty is the tensor itself."""

    every_n_steps: PositiveInt = 1
    """Store at one of so many steps, the first included: optimizer steps in training, each with all its
    batches; batches of an epoch elsewhere. Hooks are on the submodules at these steps only."""

    max_bytes: PositiveInt | None = 10_000_000_000
    """When so many bytes are stored by one process, nothing more is; None sets no limit."""

    ranks: Ranks = "zero"
    """Which of several processes store: the first, all, or those with these global ranks. `all` and a
    list give each a folder of its own, `rank_<rank>`."""

    @model_validator(mode="after")
    def _check_outputs(self) -> Self:
        for option in ("exclude", "reduce"):
            if getattr(self, option) and not self.include:
                raise ValueError(
                    f"`{option}` is about outputs of submodules, and `include` names none; set it, to "
                    "['*'] for all"
                )
        if len(set(self.reduce)) < len(self.reduce):
            raise ValueError(f"`reduce` names one twice: {', '.join(self.reduce)}; remove one")
        return self

    @override
    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        """Yield the callback.

        Raises:
            PluginLoadError: nshutils is not installed.
        """
        if not self.enabled:
            return
        require_nshutils()
        from .callback import ActSaveCallback

        yield ActSaveCallback(self, run=trainer_config.run)


def require_nshutils() -> None:
    """Raise if nshutils cannot be imported.

    Raises:
        PluginLoadError: It is not installed.
    """
    if importlib.util.find_spec("nshutils") is None:
        raise PluginLoadError(
            "the callback 'act_save' needs the package nshutils, which is not installed; "
            "run `pip install nshtrainer-wandb[actsave]`, or set `enabled: false`"
        )
