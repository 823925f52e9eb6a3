from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nshtrainer_checkpoint.metadata import SidecarReader, is_intact

HERE = Path(__file__).parent


def run(script: str, *args: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HERE / script, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_killed_at_any_file_event_a_run_goes_on_where_it_was(tmp_path: Path):
    """One run, killed in 15 saves: `last` and `best` always load, no step that was saved is lost."""
    done = run("kill_training.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]

    assert [f["killed"] for f in found] == [True] * 15 + [False]
    assert all(f["last.ckpt"] and f["best_val_loss.ckpt"] and f["intact"] for f in found)
    newest = [f["newest"] for f in found]
    assert newest == sorted(newest)
    assert newest[-1] > 2
    folder = tmp_path / "nshtrainer_logs" / "r" / "checkpoint" / "last"
    whole = {r.path.name for r in SidecarReader().records(folder)}
    assert {n.removesuffix(".metadata.json") for n in os.listdir(folder)} == whole


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", ["ranks_differ", "one_rank"])
def test_ranks_that_see_other_metrics_agree(tmp_path: Path, case: str):
    """Rank 0's metric decides for all; the run does not hang and resumes."""
    for epochs in (2, 4):
        done = run("ddp_training.py", tmp_path, case, epochs, "r")
        assert done.returncode == 0, done.stderr[-2000:]

    records = SidecarReader().records(
        tmp_path / "nshtrainer_logs" / "r" / "checkpoint" / "best_val_loss"
    )
    assert [(r.epoch, r.value) for r in records] == [(3, -3.0)]
    told = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert told == [f"16 {records[0].path}"] * 2


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_share_one_run_and_its_emergency_checkpoint(tmp_path: Path):
    """Without an id in the config there is one run; an exception on all ranks saves once, at once."""
    done = run("ddp_training.py", tmp_path, "exception", 2)
    assert done.returncode != 0
    assert "the user's error" in done.stderr

    (folder,) = (tmp_path / "nshtrainer_logs").glob("*/checkpoint/on_exception")
    (record,) = SidecarReader().records(folder)
    assert record.step == 3
    assert is_intact(record)
