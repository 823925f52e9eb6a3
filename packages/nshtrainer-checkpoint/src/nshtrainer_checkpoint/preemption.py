"""Signals that ask for a checkpoint: noted by a handler, agreed on between optimizer steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Preemption"]

log = logging.getLogger(__name__)

_STRIDE = 16
"""Steps between looks where the host runs ahead of the device."""

_rounds = [0]
"""How many signals this process has acted on with the others: each gets a key of its own."""


class Preemption:
    """Notes signals of one trainer and lets all ranks act on one at the same optimizer step.

    The handler that was there is called too, so Lightning's way out on SIGTERM and SLURM's requeue
    go on. Those are collectives: with several ranks they are called by `pass_on`, on all ranks at one
    step, and before that only where the signal comes again. While a signal is acted on, it is not
    heard again: Lightning's rank 0 sends it on to the ranks that it started. Ranks need an
    all-reduce in each optimizer step, as in DDP and FSDP.

    Args:
        signals: Names of the signals; those that this platform lacks are passed over.
    """

    def __init__(self, signals: Iterable[str] = ("SIGTERM", "SIGUSR1")) -> None:
        self.signals = tuple(signals)
        self._noted: str | None = None
        self._before: dict[int, Any] = {}
        self._heard: set[int] = set()
        self._acting_on: str | None = None
        self._acts_together = False

    def attach(self, trainer: Trainer) -> None:
        """Put the handlers in place; nothing outside the main thread. Call in `on_train_start`."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._acts_together = trainer.world_size > 1 and dist.is_initialized()
        for name in self.signals:
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)

    def detach(self) -> None:
        """Put back what was there; harmless if called again. Call on every way out."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in list(self._before.items()):
            # Someone who came later keeps the place, and calls us: we only pass the signal on.
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
                del self._before[number]
        self._acts_together, self._noted, self._acting_on = False, None, None

    def requested(self, trainer: Trainer) -> str | None:
        """Return the signal to act on now, the same on every rank; call after each optimizer step.

        One signal is returned once.
        """
        if trainer.world_size == 1 or not dist.is_initialized():
            noted, self._noted = self._noted, None
            return noted
        return self._agreed(trainer)

    def _agreed(self, trainer: Trainer) -> str | None:
        # A rank writes after step k, before it gives its gradients to step k + 1, so no rank can
        # have finished step k + 1 before the write: all of them see it there. With accumulation
        # too, since the last micro-batch of a step is reduced. On a GPU the host runs ahead of
        # the reduction; there the ranks wait for the device at every 16th step, and act only then.
        step = trainer.global_step
        stride = 1 if trainer.strategy.root_device.type == "cpu" else _STRIDE
        store: Any = distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] -- torch offers no public way to the store
        key = f"nshtrainer/preemption/{_rounds[0]}"
        if self._noted is not None:
            # The first to write wins; a later one is of the same request.
            store.compare_set(key, "", f"{(step // stride + 1) * stride} {self._noted}")
            self._noted = None
        if step % stride:
            return None
        if stride > 1:
            torch.accelerator.synchronize()
        if not store.check([key]):
            return None
        target, name = store.get(key).decode().split(" ")
        if step < int(target):
            return None
        _rounds[0] += 1
        self._acting_on = name
        return name

    def _note(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == self._acting_on:
            return
        self._noted = name
        is_again = number in self._heard
        self._heard.add(number)
        before = self._before.get(number)
        if callable(before) and (is_again or not self._acts_together):
            before(number, frame)

    def pass_on(self, name: str) -> None:
        """Let the handler before act on the signal *name*; called on all ranks, after the save."""
        number = getattr(signal, name, None)
        before = None if number is None else self._before.get(number)
        self._heard.discard(number)
        try:
            if self._acts_together and callable(before):
                before(number, None)
        finally:
            self._acting_on = None
