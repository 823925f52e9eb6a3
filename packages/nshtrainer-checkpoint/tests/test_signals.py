"""A cluster's signal, sent to real training: the step it falls into is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nshtrainer_checkpoint.metadata import Record, SidecarReader, is_intact

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 on this platform"),
]


def train_and_send(
    root: Path, number: int, *options: str, ranks: int = 1, to: int = 0
) -> tuple[int, str, list[Record]]:
    """Exit status, what was printed, and the checkpoints."""
    script = Path(__file__).with_name("signal_training.py")
    process = subprocess.Popen(
        [sys.executable, script, root, str(ranks), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        pids = [root / f"rank{rank}.pid" for rank in range(ranks)]
        deadline = time.monotonic() + 60
        while not all(p.exists() and p.read_text() for p in pids):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int(pids[to].read_text()), number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, SidecarReader().records(root / "checkpoint" / "last")


@pytest.mark.parametrize("options", [(), ("async",)], ids=["sync", "async"])
def test_sigterm_saves_the_step_and_ends_training(tmp_path: Path, options: tuple[str, ...]):
    """As Lightning ends it, with a checkpoint that no other option asked for."""
    _, output, records = train_and_send(tmp_path, signal.SIGTERM, *options)

    assert not (tmp_path / "rank0.finished").exists(), output
    (record,) = records
    assert 3 < record.step < 400
    assert is_intact(record)


def test_sigusr1_saves_the_step_and_training_goes_on(tmp_path: Path):
    """It would end a process that has no handler for it."""
    status, output, records = train_and_send(tmp_path, signal.SIGUSR1)

    assert status == 0, output
    assert (tmp_path / "rank0.finished").exists()
    # The last one keeps one: that of the end. Its number tells of the one before.
    (record,) = records
    assert (record.step, record.save_number) == (400, 2)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "to"), [("SIGTERM", 0), ("SIGUSR1", 1)])
def test_a_signal_to_one_rank_is_acted_on_by_both(tmp_path: Path, name: str, to: int):
    """Whichever rank hears it, both save the same step; nobody waits for a rank that has gone."""
    number = getattr(signal, name)
    status, output, records = train_and_send(tmp_path, number, ranks=2, to=to)

    (record,) = records
    assert is_intact(record)
    if name == "SIGUSR1":
        assert status == 0, output
        assert (record.step, record.save_number) == (400, 2)
    else:
        assert 3 < record.step < 400
        assert not list(tmp_path.glob("*.finished")), output
