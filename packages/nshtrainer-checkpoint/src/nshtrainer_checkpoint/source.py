"""The checkpoint that a run starts from: found for `ckpt_path="auto"`, looked at before it is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.trainer.states import TrainerFn

from nshtrainer.errors import ConfigError

from . import objects
from .links import follow, real_name
from .metadata import Record, SidecarReader, is_intact, pending_of
from .places import Place, as_place, is_remote
from .ranks import agree
from .resume import ResumeState
from .retention import newest_first
from .verify import damage
from .writer import Writer, newest_checkpoint, writers_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["AUTO", "check_source", "leave_after_exception", "stop_checking"]

log = logging.getLogger(__name__)

AUTO = "auto"
"""As a `ckpt_path`: the newest checkpoint of this run, or none."""

_METHOD = "resume_start"


def check_source(trainer: Trainer) -> None:
    """Have *trainer* resolve `"auto"`, and refuse a checkpoint that is not what was committed.

    Called in `setup`, when the folders are settled and cleared up. No hook comes between that and
    the moment when Lightning reads the file, so the connector's `resume_start` is wrapped. A file
    without metadata of ours, say one of Lightning's own, is left to torch.
    """
    connector = _connector(trainer)
    instance = cast("dict[str, Any]", vars(connector))
    if not isinstance(instance.get(_METHOD), _CheckedStart):
        instance[_METHOD] = _CheckedStart(trainer, instance.get(_METHOD))


def stop_checking(trainer: Trainer) -> None:
    """Undo `check_source`; does nothing without it, or where somebody has wrapped the method since."""
    instance = cast("dict[str, Any]", vars(_connector(trainer)))
    wrapper = instance.get(_METHOD)
    if isinstance(wrapper, _CheckedStart):
        del instance[_METHOD]
        if wrapper.below is not None:
            instance[_METHOD] = wrapper.below


def leave_after_exception(writer: Writer, trainer: Trainer) -> None:
    """Leave Lightning's loops as they were, if *writer* is the last of ours that may still save.

    Lightning calls no `teardown` after an exception.
    """
    if writers_of(trainer)[-1] is writer:
        ResumeState.detach(trainer)


def _connector(trainer: Trainer) -> Any:
    return trainer._checkpoint_connector  # pyright: ignore[reportPrivateUsage] -- nothing public knows what will be loaded


class _CheckedStart:
    """Stands in the place of one connector's `resume_start`; can be pickled with it."""

    def __init__(self, trainer: Trainer, below: Callable[..., None] | None) -> None:
        self.trainer, self.below = trainer, below

    def __call__(self, checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        """Find or check, then load.

        Raises:
            ConfigError: It is unfinished or damaged; the message names the newest good one beside it.
            NshTrainerError: The same, on the other ranks.
        """
        trainer = self.trainer
        if checkpoint_path == AUTO:
            checkpoint_path = agree(trainer, lambda: _newest(trainer))
        elif checkpoint_path and isinstance(checkpoint_path, (str, Path)):
            checkpoint_path = agree(trainer, lambda: _checked(str(checkpoint_path)))
        if checkpoint_path:
            source = real_name(checkpoint_path)
            for writer in writers_of(trainer):
                writer.sources.add(source)
        if self.below is not None:
            self.below(checkpoint_path, *args, **kwargs)
        else:
            connector: Any = _connector(trainer)
            method = cast("Callable[..., None]", type(connector).resume_start)
            method(connector, checkpoint_path, *args, **kwargs)


def _newest(trainer: Trainer) -> str | None:
    if trainer.state.fn != TrainerFn.FITTING:
        raise ConfigError(
            f"ckpt_path='auto' resumes training; for `{trainer.state.fn}` say which checkpoint is "
            "meant: 'best', 'last' or a path"
        )
    found = newest_checkpoint(trainer)
    if found is None:
        log.info("there is nothing to resume, so training starts from scratch (ckpt_path='auto')")
        return None
    log.info("resuming from %s (ckpt_path='auto')", found)
    return str(found)


def _checked(source: str) -> str:
    """Return what is to be loaded for *source*, which may be a link or a pointer, if it is whole."""
    try:
        place = as_place(source)
    except ConfigError:
        return source  # of a kind that Lightning may know
    path = follow(place)
    if path is None:
        return source  # Lightning says that it is not there
    if isinstance(path, Path):
        path = Path(os.path.realpath(path))
    records = SidecarReader().records(path.parent)
    record = next((r for r in records if r.path == path), None)
    if record is None:
        if _exists(pending_of(path)):
            raise ConfigError(
                f"{source} was not finished: the process that wrote it was killed. {_other(records)}"
            )
        return str(path) if is_remote(path) else source
    if not is_intact(record):
        raise ConfigError(f"{source} is damaged: {damage(record)}. {_other(records, record)}")
    if not record.weights_finite:
        log.warning(
            "%s holds weights that are NaN or infinite. %s", source, _other(records, record)
        )
    return str(path)


def _exists(place: Place) -> bool:
    return place.exists() if isinstance(place, Path) else objects.look(place) is not None


def _other(records: list[Record], damaged: Record | None = None) -> str:
    for record in newest_first(r for r in records if r != damaged and not r.weights_only):
        if record.weights_finite and is_intact(record):
            return f"The newest good one beside it is {record.path} (step {record.step}); use that."
    return "There is no good one beside it; look for one with `nshtrainer checkpoint list`."
