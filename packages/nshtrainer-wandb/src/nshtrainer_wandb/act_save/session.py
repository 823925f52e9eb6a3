"""`nshutils.ActSave`, switched on for a stage: with a budget, on any rank, off on every way out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from lightning.pytorch import Trainer

__all__ = ["Budget", "Session"]

log = logging.getLogger(__name__)

_HEADER_BYTES = 128
"""What a `.npy` file has besides the values."""


@dataclass
class Budget:
    """Bytes that a process may store, and has stored."""

    max_bytes: int | None
    used: int = 0
    is_spent: bool = False

    def take(self, num_bytes: int) -> bool:
        """Whether *num_bytes* more may be stored; from the first time that they may not, nothing may."""
        if not self.is_spent and self.max_bytes is not None:
            self.is_spent = self.used + num_bytes > self.max_bytes
            if self.is_spent:
                log.warning(
                    "act_save stores nothing more: %d bytes are stored, and %d more are above "
                    "`max_bytes`, %d",
                    self.used,
                    num_bytes,
                    self.max_bytes,
                )
        if not self.is_spent:
            self.used += num_bytes
        return not self.is_spent


class Session:
    """ActSave is on from `Session(...)` to `close`; an ActSave that was on before is used and stays on.

    Args:
        folder: Where a new numbered folder is made.
        budget: What may be stored.
        trainer: Whose stage it is; the session of one that has ended is closed by the next.

    Raises:
        OSError: The folder cannot be made.
    """

    _open: ClassVar[tuple[weakref.ref[Trainer], ExitStack] | None] = None
    """Left behind if another callback failed while an exception was handled."""

    def __init__(self, folder: Path, budget: Budget, trainer: Trainer) -> None:
        from nshutils import actsave

        _close_left_behind()
        self._library: Any = actsave.ActSave
        self._budget = budget
        self._label, self.on_close = ExitStack(), ExitStack()
        self.has_stored = False
        if trainer.world_size > 1:
            # It refuses several processes, which would share a folder; here none does.
            self._replace(cast("Any", actsave)._saver, "_ensure_supported", lambda: None)
        with self.on_close:
            self.on_close.enter_context(self._library.enabled(folder))
            saver: Any = self._library._saver  # not public, and the one place to bound it
            self._save: Callable[[Any], None] = saver._save_activation
            self._replace(saver, "_save_activation", self._save_within_budget)
            self.on_close.callback(self._label.close)
            self.on_close = self.on_close.pop_all()
        Session._open = (weakref.ref(trainer), self.on_close)

    def close(self) -> None:
        """Switch ActSave off, and take back whatever was done for it."""
        self.on_close.close()
        if Session._open is not None and Session._open[1] is self.on_close:
            Session._open = None

    @property
    def is_spent(self) -> bool:
        """Whether nothing more is stored."""
        return self._budget.is_spent

    def set_label(self, label: str | None) -> None:
        """Let names start with *label*, and nothing else: `validation`, not `train.validation`."""
        self._label.close()
        if label is not None:
            self._label.enter_context(self._library.context(label))

    @contextmanager
    def paused(self) -> Generator[None]:
        """Nothing is stored inside."""
        with self._library.disabled():
            yield

    def store(self, tensors: Mapping[str, Any]) -> None:
        """Store *tensors* below the label."""
        self._library(dict(tensors))

    def _save_within_budget(self, activation: Any) -> None:
        if self._budget.is_spent or (value := activation()) is None:
            return
        if not self._budget.take(value.nbytes + _HEADER_BYTES):
            return
        try:
            self._save(activation)
        except OSError as error:
            self._budget.is_spent = True
            log.warning("act_save stores nothing more: %s", error)
        else:
            self.has_stored = True

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self.on_close.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _close_left_behind() -> None:
    if (left := Session._open) is None:  # pyright: ignore[reportPrivateUsage] -- of this module
        return
    trainer = left[0]()
    if trainer is None or trainer.state.stopped:
        Session._open = None  # pyright: ignore[reportPrivateUsage] -- as above
        left[1].close()
