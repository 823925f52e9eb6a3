from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import resume_runs as runs
import torch


def train(folder: Path, seed: int, step: int, *, resume: bool, workers: int) -> None:
    script = Path(__file__).with_name("ranks.py")
    numbers = [str(int(x)) for x in (seed, step, resume, workers)]
    done = subprocess.run(
        [sys.executable, script, folder, *numbers],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0 or step, done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("workers", [2])
def test_each_rank_goes_on_where_it_was(tmp_path: Path, workers: int):
    """Two ranks, new processes, other seeds, saved inside the second epoch: each as if never ended."""
    train(tmp_path, 1, 0, resume=False, workers=workers)
    train(tmp_path, 1, 5, resume=False, workers=workers)
    train(tmp_path, 2, 0, resume=True, workers=workers)

    for rank in (0, 1):
        straight, resumed = (torch.load(tmp_path / f"{n}{rank}.pt", weights_only=False) for n in ("straight", "resumed"))  # fmt: skip
        assert straight["seen"][-len(resumed["seen"]) :] == resumed["seen"]
        del straight["seen"], resumed["seen"]
        assert runs.equal(straight, resumed)
