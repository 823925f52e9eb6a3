"""Kills at every file event of a save, and at random moments: nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 60
HARMS = (
    "last not resumable",
    "last dangling",
    "last missing",
    "last torn",
    "no loadable file",
    "best missing",
    "best torn",
    "torn under a final name",
    "file without metadata",
    "metadata without file",
    "metadata unreadable",
    "metadata lying",
    "resumed behind the newest",
    "poisoned restarts",
    "left after the next start",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the benchmark finds after 60 kills: each event of one save, the rest at random."""
    folder = tmp_path_factory.mktemp("kills")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.faults", "--json", folder / "kills.json"),
            *("--dir", folder, "kill", "--kills", str(KILLS), "--window", "0.3"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert (folder / "kills.json").exists(), done.stderr[-2000:]
    return json.loads((folder / "kills.json").read_text())


@pytest.mark.slow
def test_the_kills_hit_saves(report: dict[str, Any]):
    """Every event of a save of both is among them: the commits, the links and the deletions."""
    assert report["kills"] == KILLS
    assert {"open", "os.rename", "os.remove", "os.link", "os.symlink"} <= set(report["events"])
    assert report["cells"]["every file event"]["kills"] >= 20
    # A kill between commit and link leaves the link one save behind: were there none, the kills
    # would have missed the save.
    assert report["cells"]["every file event"]["link behind the newest"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_no_kill_does_harm(report: dict[str, Any], harm: str):
    """Each way to lose work that others were seen to lose it by happens to none of 60 kills."""
    found = {name: cell[harm] for name, cell in report["cells"].items()}
    told = [b for cell in report["cells"].values() for b in cell["bad"] if harm in b["rows"]]
    assert not any(found.values()), json.dumps(told, indent=1)[:4000]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_does_not_pile_up_files(report: dict[str, Any]):
    """Best, last, one more of each while both are replaced, and what was resumed from."""
    assert max(cell["most files at once"] for cell in report["cells"].values()) <= 5
