"""One of two ranks fails or is killed: the job ends, the last commit stands, and it goes on from there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nshtrainer_checkpoint.metadata import SidecarReader, is_intact

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).with_name("rank_training.py")


def train(root: Path, what: str, where: str = "-", rank: int = 0) -> tuple[int, str]:
    """Exit status and what both ranks printed; both have ended, or this fails."""
    log = root / f"{what}.log"
    with log.open("w") as output:
        command = [sys.executable, SCRIPT, root, what, where, str(rank)]
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, timeout=100, check=False
        ).returncode
    deadline = time.monotonic() + 60
    for pid in (int(p.read_text()) for p in root.glob(f"{what}*.pid")):
        while is_running(pid):
            assert time.monotonic() < deadline, f"process {pid} hangs\n{log.read_text()}"
            time.sleep(0.1)
    return status, log.read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    ("what", "where", "rank", "goes_on"),
    [
        ("exception", "train", 0, False),
        ("exception", "validation", 1, True),
        ("kill", "train", 0, True),
        ("kill", "train", 1, False),
        ("kill", "save", 0, True),
    ],
)
def test_the_job_ends_and_goes_on_from_what_was_committed(
    tmp_path: Path, what: str, where: str, rank: int, *, goes_on: bool
):
    """No rank waits for one that has gone; an error is shown as it was raised."""
    status, output = train(tmp_path, what, where, rank)

    assert status != 0, output
    if what == "exception":
        assert "the user's error" in output
    folder = tmp_path / "nshtrainer_logs" / "r" / "checkpoint"
    records = [r for f in ("last", "on_exception") for r in SidecarReader().records(folder / f)]
    assert records
    assert all(is_intact(r) for r in records)
    assert max(r.step for r in records) >= 4

    if goes_on:  # a second start of two processes, as long as the first
        status, output = train(tmp_path, "resume")
        assert status == 0, output
        assert (tmp_path / "finished").read_text() == "12"
