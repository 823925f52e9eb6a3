"""Disks that are full, forbidden, gone or in the way: told clearly, and nothing older is harmed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAULT, STEPS = 2, 4  # the step after which the fault comes, and the steps to make


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> what came of it; each is a process, and all run at once, since mostly they wait."""
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.faults", "--json", folder / "disk.json"),
            *("--dir", folder, "disk"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "disk.json").read_text())
    assert not [name for name, result in found.items() if "log" in result], found
    return found


LASTING = ("full", "refused", "quota", "read_only")
WORDS = {
    "full": "No space left",
    "refused": "No space left",
    "quota": "too large",
    "read_only": "Read-only file system",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LASTING)
def test_a_save_that_fails_for_good_stops_training_with_the_cause(results: Any, kind: str):
    """By default; the checkpoint before it is the newest, and nothing torn has a final name."""
    result = results[f"{kind}-raise"]
    name, text = result["error"]
    assert name == "OSError"
    assert WORDS[kind] in text
    assert ("are free in" in text) == (kind != "read_only")
    assert result["step"] == FAULT + 1
    assert result["last"] == ["ok", FAULT]
    assert result["newest"] == FAULT
    assert result["faults"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LASTING)
def test_with_warn_training_goes_on_without_the_checkpoint(results: Any, kind: str):
    """All steps are made, the log says each time what failed, the older checkpoint stays."""
    result = results[f"{kind}-warn"]
    assert result["error"] is None
    assert result["step"] == STEPS
    assert any(h.startswith("ERROR") and WORDS[kind] in h for h in result["heard"])
    assert result["last"] == ["ok", FAULT]
    assert result["faults"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "refused"])
def test_a_disk_that_is_full_for_a_moment_costs_nothing(results: Any, kind: str):
    """Saving is tried again: no error, no checkpoint missing, and the log tells of the wait."""
    result = results[f"{kind}-raise-passing"]
    assert result["error"] is None
    assert result["last"] == ["ok", STEPS]
    assert result["faults"] == {}
    assert any("trying again" in h for h in result["heard"])


@pytest.mark.slow
@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_file_in_the_place_of_the_folder_is_named(results: Any, on_save_error: str):
    """The message has the path; best checkpoints are as they were."""
    result = results[f"blocked-{on_save_error}"]
    told = result["error"][1] if on_save_error == "raise" else " ".join(result["heard"])
    assert "checkpoint/last" in told
    assert result["best"] == ["ok", 1]
    assert (result["error"] is None) == (on_save_error == "warn")


@pytest.mark.slow
def test_a_deleted_folder_is_made_again(results: Any):
    """The next save makes it, and training never stops."""
    result = results["removed-raise"]
    assert result["error"] is None
    assert result["last"] == ["ok", STEPS]
    assert result["faults"] == {}


@pytest.mark.slow
def test_after_every_fault_the_run_goes_on_from_its_newest_checkpoint(results: Any):
    """When the disk is well again: no step that was saved is lost, and no litter is left."""
    for name, result in results.items():
        again = result["again"]
        assert again["error"] is None, name
        assert again["start"]["step"] >= max(result["newest"], 0), name
        assert again["step"] == STEPS + 2, name
        assert again["last"] == ["ok", STEPS + 2], name
        assert again["faults"] == {}, name
        assert again["leftovers"] == [], name
