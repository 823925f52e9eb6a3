"""One last look at every checkpoint before it is written: the event `on_checkpoint_prepare`.

Lightning calls no callback hook for a weights-only save, so a callback that must change what is in
the file (averaged weights, say) cannot rely on `on_save_checkpoint`. Every save, though, passes
through `trainer.strategy.save_checkpoint`; that one method is wrapped here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from nshtrainer.runtime.events import ON_CHECKPOINT_PREPARE, emit

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

__all__ = ["AVERAGE_KEY", "PREPARED_KEY", "install", "is_installed", "is_weights_only", "uninstall"]

log = logging.getLogger(__name__)

AVERAGE_KEY: Final = "nshtrainer_average"
"""Where a checkpoint holds the weights' moving average, or the trained weights beside the average:
what writes it (the family nshtrainer-ema) and what reads it know the content by its `version`."""

PREPARED_KEY: Final = "nshtrainer_prepared"
"""Set to `True` in a checkpoint whose listeners have been called; stays in the file."""

_METHOD: Final = "save_checkpoint"
_HANDLE: Final = "_nshtrainer_save"


def install(trainer: Trainer) -> None:
    """Have every later save of *trainer* emit `on_checkpoint_prepare` before anything is written.

    The listeners are called on every rank, in the order of `trainer.callbacks`, with the
    checkpoint to edit and whether it is weights-only. If one raises, the error reaches whoever is
    saving, with the callback named; nothing is written, and the caller's dict keeps the entries
    it had. Under several ranks it must therefore raise on all of them or on none.

    Calling this again changes nothing. Wrappers that others put around the method stay in effect.
    """
    strategy = trainer.strategy
    instance = vars(strategy)
    if is_installed(trainer):
        return
    stale = instance.get(_HANDLE)
    if isinstance(stale, _PreparingSave):
        # Somebody else's wrapper lies above ours, or took its place: which, cannot be seen. A
        # new one goes on top and the old one, if it is still below, only passes on.
        stale.active = False
    wrapper = _PreparingSave(trainer, strategy, instance.get(_METHOD))
    instance[_HANDLE] = instance[_METHOD] = wrapper
    log.debug("checkpoints of %s are prepared by callbacks", type(strategy).__name__)


def uninstall(trainer: Trainer) -> None:
    """Undo `install`; does nothing without it.

    The strategy is afterwards exactly as it was. Where somebody has wrapped the method since,
    theirs stays and ours, below it, only passes calls on.
    """
    instance = vars(trainer.strategy)
    wrapper = instance.pop(_HANDLE, None)
    if not isinstance(wrapper, _PreparingSave):
        return
    wrapper.active = False
    if instance.get(_METHOD) is not wrapper:
        return
    if wrapper.below is None:
        del instance[_METHOD]
    else:
        instance[_METHOD] = wrapper.below


def is_installed(trainer: Trainer) -> bool:
    """Whether `install` is in effect and outermost."""
    wrapper = vars(trainer.strategy).get(_METHOD)
    return isinstance(wrapper, _PreparingSave) and wrapper.active


def is_weights_only(checkpoint: dict[str, Any]) -> bool:
    """Whether Lightning made *checkpoint* without the state that resuming needs."""
    return "optimizer_states" not in checkpoint and "callbacks" not in checkpoint


class _PreparingSave:
    """Stands in the place of one strategy's `save_checkpoint`.

    A class of this module rather than a closure, and with the strategy's own method looked up by
    class at each call rather than kept as a bound method: spawning strategies pickle the strategy,
    and a pickled bound method would find this very object again by its name.
    """

    def __init__(
        self, trainer: Trainer, strategy: Strategy, below: Callable[..., None] | None
    ) -> None:
        self.trainer = trainer
        self.strategy = strategy
        self.below = below
        self.active = True

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if self.active and not checkpoint.get(PREPARED_KEY, False):
            _prepare(self.trainer, checkpoint)
        if self.below is not None:
            self.below(checkpoint, *args, **kwargs)
        else:
            type(self.strategy).save_checkpoint(self.strategy, checkpoint, *args, **kwargs)


def _prepare(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    # On a copy of the top level: a listener that fails half-way leaves no half-prepared dict
    # behind, which a retry would prepare twice.
    prepared = dict(checkpoint)
    emit(trainer, ON_CHECKPOINT_PREPARE, prepared, is_weights_only(checkpoint), propagate=True)
    prepared[PREPARED_KEY] = True
    checkpoint.clear()
    checkpoint.update(prepared)
