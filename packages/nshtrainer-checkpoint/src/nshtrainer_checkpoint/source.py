"""The checkpoint that a run starts from is looked at before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nshtrainer.errors import ConfigError

from .metadata import Record, SidecarReader, is_intact, pending_of
from .retention import newest_first
from .writer import agree

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["check_loads", "stop_checking"]


def check_loads(trainer: Trainer) -> None:
    """Have *trainer* refuse a checkpoint that is not what was committed; called in `setup`.

    No hook comes before Lightning reads the file, so the strategy's `load_checkpoint` is wrapped. A
    file without metadata of ours, say one of Lightning's own, is left to torch.
    """
    instance = vars(trainer.strategy)
    if not isinstance(instance.get("load_checkpoint"), _CheckingLoad):
        instance["load_checkpoint"] = _CheckingLoad(trainer, instance.get("load_checkpoint"))


def stop_checking(trainer: Trainer) -> None:
    """Undo `check_loads`; does nothing without it, or where somebody has wrapped the method since."""
    instance = vars(trainer.strategy)
    wrapper = instance.get("load_checkpoint")
    if isinstance(wrapper, _CheckingLoad):
        del instance["load_checkpoint"]
        if wrapper.below is not None:
            instance["load_checkpoint"] = wrapper.below


class _CheckingLoad:
    """Stands in the place of one strategy's `load_checkpoint`; can be pickled with it."""

    def __init__(self, trainer: Trainer, below: Callable[..., Any] | None) -> None:
        self.trainer, self.below = trainer, below

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Check, then load.

        Raises:
            ConfigError: It is unfinished or damaged; the message names the newest good one beside it.
            NshTrainerError: The same, on the other ranks.
        """
        agree(self.trainer, lambda: _check(str(checkpoint_path)))
        if self.below is not None:
            return self.below(checkpoint_path, *args, **kwargs)
        load: Any = type(self.trainer.strategy).load_checkpoint
        return load(self.trainer.strategy, checkpoint_path, *args, **kwargs)


def _check(source: str) -> None:
    if "://" in source:
        return
    path = Path(os.path.realpath(source))
    if not path.exists():
        return  # Lightning says so
    records = SidecarReader().records(path.parent)
    record = next((r for r in records if r.path == path), None)
    if record is None:
        if pending_of(path).exists():
            raise ConfigError(
                f"{source} was not finished: the process that wrote it was killed. {_other(records)}"
            )
        return
    if not is_intact(record):
        size = path.stat().st_size if path.is_file() else None
        damage = (
            f"it has {size} bytes where {record.size} were written"
            if size not in (None, record.size)
            else "its SHA-256 is not that of what was written"
        )
        raise ConfigError(f"{source} is damaged: {damage}. {_other(records, record)}")


def _other(records: list[Record], damaged: Record | None = None) -> str:
    for record in newest_first(r for r in records if r != damaged and not r.weights_only):
        if is_intact(record):
            return f"The newest good one beside it is {record.path} (step {record.step}); use that."
    return "There is no good one beside it; look for one with `nshtrainer checkpoint list`."
