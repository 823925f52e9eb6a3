"""Signals are noted, given out once, and the handlers before are called and put back."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from lightning.pytorch import Trainer

from nshtrainer_checkpoint.preemption import Preemption


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 on this platform")
def test_a_signal_is_returned_once_and_the_handler_before_is_called_and_restored() -> None:
    """The handler in place before hears the signal, and is in place again afterwards."""
    heard: list[int] = []

    def earlier(number: int, _frame: Any) -> None:
        heard.append(number)

    first = signal.signal(signal.SIGUSR1, earlier)
    preemption = Preemption(["SIGUSR1", "SIGNOSUCH"])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    try:
        preemption.attach(trainer)
        preemption.attach(trainer)
        assert preemption.requested(trainer) is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested(trainer) == "SIGUSR1"
        assert preemption.requested(trainer) is None
        assert heard == [signal.SIGUSR1]
        preemption.detach()
        assert signal.getsignal(signal.SIGUSR1) is earlier
    finally:
        signal.signal(signal.SIGUSR1, first)
