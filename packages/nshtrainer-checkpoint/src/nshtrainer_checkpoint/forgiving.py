"""What other callbacks do wrong when training has failed already: told, and never in the way."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Generator, MutableMapping
from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["drop_what_cannot_be_stored", "forgiving", "isolate", "stop_isolating"]

log = logging.getLogger(__name__)

_ADDING = ("state_dict", "on_save_checkpoint", "on_checkpoint_prepare")
_METHOD = "on_exception"
_NOTHING = object()
_NEEDED = frozenset(("callbacks", "loops", "lr_schedulers", "optimizer_states", "state_dict"))
"""Without these nothing can be resumed from."""


@contextlib.contextmanager
def forgiving(trainer: Trainer) -> Generator[None]:
    """Leave out of a save what a callback or the module fails to add to it, and name the culprit."""
    places = [(c, name) for c in _callbacks_of(trainer) for name in _ADDING]
    places += [
        (m, "on_save_checkpoint") for m in (trainer.lightning_module, _data_of(trainer)) if m
    ]
    put: list[tuple[dict[str, Any], str, Any]] = []
    for owner, name in places:
        method = getattr(owner, name, None)
        if callable(method):
            held = cast("dict[str, Any]", vars(owner))
            put.append((held, name, held.get(name, _NOTHING)))
            held[name] = _guarded(owner, name, method)
    try:
        yield
    finally:
        for held, name, before in reversed(put):
            if before is _NOTHING:
                held.pop(name, None)
            else:
                held[name] = before


def drop_what_cannot_be_stored(checkpoint: MutableMapping[str, Any]) -> None:
    """Remove from *checkpoint* what torch cannot write, as far as training can resume without it."""
    states = cast("dict[str, Any]", checkpoint.get("callbacks", {}))
    extras = {key: value for key, value in checkpoint.items() if key not in _NEEDED}
    for place, found in (("callbacks", states), ("", extras)):
        for key, value in list(found.items()):
            if (error := _why_not(value)) is None:
                continue
            log.error(
                "the state %r cannot be written (%s: %s); the checkpoint is saved without it",
                key,
                type(error).__name__,
                error,
            )
            del (states if place else checkpoint)[key]


def isolate(trainer: Trainer, keeper: object) -> None:
    """Let no `on_exception` hide the exception of the fit that follows, or keep others from theirs.

    *keeper*, whose own needs no guard, calls `stop_isolating` if there is no exception.
    """
    for owner in (*_callbacks_of(trainer), _data_of(trainer)):
        if owner is None or owner is keeper:
            continue
        held = cast("dict[str, Any]", vars(owner))
        if callable(getattr(owner, _METHOD, None)) and not isinstance(held.get(_METHOD), _Guard):
            held[_METHOD] = _Guard(owner, held.get(_METHOD))


def stop_isolating(trainer: Trainer) -> None:
    """Undo `isolate`; does nothing without it."""
    for owner in (*_callbacks_of(trainer), _data_of(trainer)):
        held = cast("dict[str, Any]", {} if owner is None else vars(owner))
        guard = held.get(_METHOD)
        if isinstance(guard, _Guard):
            guard.remove()


class _Guard:
    """Stands in the place of one `on_exception`, for one call; can be pickled with its owner."""

    def __init__(self, owner: Any, below: Callable[..., None] | None) -> None:
        self.owner, self.below = owner, below

    def remove(self) -> None:
        held = cast("dict[str, Any]", vars(self.owner))
        if self.below is None:
            del held[_METHOD]
        else:
            held[_METHOD] = self.below

    def __call__(self, *args: Any) -> None:
        self.remove()  # Lightning calls no `teardown` after an exception
        try:
            getattr(self.owner, _METHOD)(*args)
        except Exception:
            log.exception(
                "%s.on_exception failed; the exception that stopped training is the one raised",
                type(self.owner).__name__,
            )


def _guarded(owner: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception:
            log.exception(
                "%s.%s failed; the checkpoint is saved without what it would have added",
                type(owner).__name__,
                name,
            )
            return {}

    return call


def _why_not(value: Any) -> Exception | None:
    try:
        torch.save(value, cast("Any", _Nowhere()))
    except Exception as error:  # noqa: BLE001 -- whatever pickling runs into, it is reported
        return error
    return None


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    @override
    def write(self, data: Any, /) -> int:
        return memoryview(data).nbytes

    @override
    def writable(self) -> bool:
        return True


def _callbacks_of(trainer: Trainer) -> list[Any]:
    return cast("Any", trainer).callbacks  # set in Lightning's connector


def _data_of(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
