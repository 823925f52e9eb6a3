"""Marks the phases of training steps on one trainer.

No Lightning hook says where the optimizer's work ends or where data is waited for, and a callback
cannot see what the others cost. So the strategy's `training_step`, `backward` and `optimizer_step`
are wrapped, and what the epoch loop calls around a fetch; two callbacks, the first and the last of
the trainer's, enclose the others at the hooks that any of them uses. What lies inside something
else (the forward pass inside an optimizer's closure, a callback inside the backward pass) counts for
itself only, in automatic and in manual optimization alike. All of it is gone after the training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nshtrainer.callbacks.callback import silence_unused_hooks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from .phases import Phase, PhaseClock

__all__ = ["StepProbe"]

_HOOKS: Final = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
_METHODS: Final[dict[str, Phase]] = {
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
}


class StepProbe:
    """The marks on one trainer, from `install` to `remove`.

    Args:
        phases: What they are written to.
        batch_ended: Called first of all at `on_train_batch_end`, with the trainer and the batch.
        split: False marks nothing, and only calls *batch_ended*.
    """

    def __init__(
        self, phases: PhaseClock, batch_ended: Callable[[Trainer, Any], None], *, split: bool
    ) -> None:
        self.phases = phases
        self._batch_ended = batch_ended
        self._split = split
        self._around: dict[str, Phase | None] = {}
        self._fetching: Phase | None = None
        self._wrappers: list[_Wrapper] = []

    def install(self, trainer: Trainer) -> None:
        """Put the marks in place; at `on_train_start`, when all callbacks are there."""
        callbacks = _callbacks(trainer)
        hooks = {"on_train_batch_end"}
        if self._split:
            hooks |= {hook for hook in _HOOKS if any(_uses(c, hook) for c in callbacks)}
        last = [_Last(self, hooks)] if self._split else []
        trainer.callbacks = [_First(self, hooks), *callbacks, *last]  # pyright: ignore[reportAttributeAccessIssue] -- set by Lightning's connector
        if not self._split:
            return
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop
        self._wrappers = [
            *(_Timed(strategy, name, self.phases, phase) for name, phase in _METHODS.items()),
            _Preceded(loop, "_on_before_fetch", self._fetch),
            _Preceded(loop, "_on_after_fetch", self._fetched),
        ]

    def remove(self, trainer: Trainer) -> None:
        """Leave the trainer as it was; nothing happens a second time.

        Where somebody has wrapped a method since, theirs stays and ours, below it, only passes on.
        """
        trainer.callbacks = [  # pyright: ignore[reportAttributeAccessIssue] -- as above
            c for c in _callbacks(trainer) if not (isinstance(c, _Marker) and c.probe is self)
        ]
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers = []

    def open(self, hook: str, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Callbacks begin with *hook*."""
        if self._split:
            self._around[hook] = self.phases.enter("callbacks")
        if hook == "on_train_batch_end":
            self._batch_ended(trainer, args[1])

    def close(self, hook: str, *args: Any) -> None:
        """Callbacks are done with *hook*."""
        self.phases.enter(self._around.pop(hook, "other"))

    def _fetch(self) -> None:
        self._fetching = self.phases.enter("data")

    def _fetched(self) -> None:
        self.phases.enter(self._fetching)


class _Wrapper:
    """Stands in the place of a method of one object until it is removed.

    Where somebody has wrapped the method since, theirs stays and this one, below it, only passes on.
    """

    below: Any
    """What stood in this place on the instance, if anything did."""

    def __init__(self, owner: Any, name: str) -> None:
        self.active = True
        self._instance = cast("dict[str, Any]", vars(owner))
        self._name = name
        self._method: Callable[..., Any] = getattr(owner, name)
        self.below = self._instance.get(name)
        self._instance[name] = self

    def remove(self) -> None:
        self.active = False
        if self._instance.get(self._name) is not self:
            return
        below: Any = self.below
        while isinstance(below, _Wrapper) and not below.active:
            below = below.below
        if below is None:
            del self._instance[self._name]
        else:
            self._instance[self._name] = below


class _Timed(_Wrapper):
    """Counts the time of a method for one phase."""

    def __init__(self, owner: Any, name: str, phases: PhaseClock, phase: Phase) -> None:
        super().__init__(owner, name)
        self._phases = phases
        self._phase: Phase = phase

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self._method(*args, **kwargs)
        before = self._phases.enter(self._phase)
        try:
            return self._method(*args, **kwargs)
        finally:
            self._phases.enter(before)


class _Preceded(_Wrapper):
    """Calls something before a method."""

    def __init__(self, owner: Any, name: str, first: Callable[[], None]) -> None:
        super().__init__(owner, name)
        self._first = first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            self._first()
        return self._method(*args, **kwargs)


class _Marker(Callback):
    def __init__(self, probe: StepProbe) -> None:
        self.probe = probe
        silence_unused_hooks(self)


class _First(_Marker):
    """Before all other callbacks."""

    def __init__(self, probe: StepProbe, hooks: set[str]) -> None:
        super().__init__(probe)
        self.__dict__.update({hook: functools.partial(probe.open, hook) for hook in hooks})


class _Last(_Marker):
    """Behind all other callbacks."""

    def __init__(self, probe: StepProbe, hooks: set[str]) -> None:
        super().__init__(probe)
        self.__dict__.update({hook: functools.partial(probe.close, hook) for hook in hooks})

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Checkpoints are saved in this hook; what comes after it is a step again.
        if self.probe.phases.phase == "callbacks":
            self.probe.phases.enter("other")


def _uses(callback: Callback, hook: str) -> bool:
    method = getattr(callback, hook)
    return callable(method) and getattr(method, "__func__", method) is not getattr(Callback, hook)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType] -- as above
