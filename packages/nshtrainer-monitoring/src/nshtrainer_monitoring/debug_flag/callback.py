"""Sets `trainer.debug` while a run is only a rehearsal."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback

from .config import DebugFlagCallbackConfig

__all__ = ["DebugFlagCallback"]

log = logging.getLogger(__name__)


class DebugFlagCallback(ConfiguredCallback[DebugFlagCallbackConfig]):
    """Sets `trainer.debug`; see `DebugFlagCallbackConfig`.

    A plain Lightning trainer has no such attribute; there it exists while it is set.
    """

    config_class = DebugFlagCallbackConfig

    def __init__(self, config: DebugFlagCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Copy without what belongs to a running trainer."""
        return {**vars(self), "_before": [], "_trainer": None}

    def _forget(self) -> None:
        self._before: list[tuple[bool, object]] = []  # was it there, and what, each time it was set
        self._trainer: weakref.ref[Trainer] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Another callback's own on_exception may have failed before ours was called.
        if self._trainer is not None and (last := self._trainer()) is not None:
            self._restore_all(last)
        self._forget()
        if self.config.enabled and trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set by Lightning's connector
            self._set(trainer)
            log.debug("trainer.debug is set for this fast_dev_run")

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.enabled:
            self._set(trainer)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.enabled:
            self._restore(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_all(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Lightning calls neither on_sanity_check_end nor teardown after an exception.
        self._restore_all(trainer)

    def _set(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self._before.append((hasattr(trainer, "debug"), getattr(trainer, "debug", None)))
        trainer.debug = True  # pyright: ignore[reportAttributeAccessIssue] -- nshtrainer's attribute, also on a plain trainer

    def _restore_all(self, trainer: Trainer) -> None:
        while self._before:
            self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if not self._before:
            return
        was_there, before = self._before.pop()
        if was_there:
            trainer.debug = before  # pyright: ignore[reportAttributeAccessIssue] -- as above
        elif hasattr(trainer, "debug"):
            del trainer.debug  # pyright: ignore[reportAttributeAccessIssue] -- as above
