from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from importlib import metadata
from pathlib import Path

import pytest

from nshtrainer.run.environment import EnvironmentSnapshot

PARTS = ["time", "hostname", "python", "command_line", "scheduler", "hardware", "git", "packages"]


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(directory), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "my-project"
    root.mkdir()
    git(root, "init", "-q", "-b", "trunk")
    (root / "file").write_text("one")
    git(root, "add", "file")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_the_snapshot_is_small_plain_data_with_every_part(tmp_path: Path):
    """All parts are there, as JSON, in less than 100 KB."""
    result = EnvironmentSnapshot(tmp_path).result()

    assert list(result) == PARTS
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert len(json.dumps(result)) < 100_000
    assert not [name for name in PARTS if "error" in result[name]]


def test_packages_are_those_that_python_knows(tmp_path: Path):
    """Reading directory names gives the versions that the metadata gives."""
    packages = EnvironmentSnapshot(tmp_path).result()["packages"]

    for name in ("pydantic", "torch", "pytest", "typing-extensions"):
        assert packages[name] == metadata.version(name)
    assert packages["nshtrainer-core"] == metadata.version("nshtrainer-core")


def test_python_and_hardware_tell_what_matters_and_no_path(tmp_path: Path):
    """Versions, processors and memory are there; where the user keeps Python is not."""
    result = EnvironmentSnapshot(tmp_path).result()

    assert result["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert result["python"]["executable"] == Path(sys.executable).name
    assert result["hardware"]["cpu_count"] == os.cpu_count()
    assert result["hardware"]["memory_bytes"] > 2**20
    assert isinstance(result["hardware"]["accelerators"], list)


def test_time_has_a_zone(tmp_path: Path):
    """A time without a zone is no time."""
    assert EnvironmentSnapshot(tmp_path).result()["time"][-6] in "+-"


def test_git_tells_commit_branch_and_whether_files_changed(repository: Path):
    """A clean and a changed working tree are told apart; the remote's credentials are not told."""
    git(repository, "remote", "add", "origin", "https://me:hunter2@example.org/r.git")
    clean = EnvironmentSnapshot(repository).result()["git"]
    (repository / "file").write_text("two")
    (repository / "sub").mkdir()
    changed = EnvironmentSnapshot(repository / "sub").result()["git"]

    assert clean == {
        "root": "my-project",
        "commit": git(repository, "rev-parse", "HEAD"),
        "branch": "trunk",
        "dirty": False,
        "remote": "https://[redacted]@example.org/r.git",
    }
    assert changed == {**clean, "dirty": True}


def test_git_without_commit_branch_or_repository(repository: Path, tmp_path: Path):
    """A detached head, an empty repository and none at all are ordinary states."""
    git(repository, "checkout", "-q", "--detach")
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q", "-b", "main")
    (tmp_path / "none").mkdir()

    assert EnvironmentSnapshot(repository).result()["git"]["branch"] is None
    empty = EnvironmentSnapshot(tmp_path / "empty").result()["git"]
    assert (empty["commit"], empty["branch"], empty["dirty"]) == (None, "main", False)
    assert EnvironmentSnapshot(tmp_path / "none").result()["git"] == {"root": None}


def test_a_part_that_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without git, and in a directory that is gone, the rest is recorded and nothing raises."""
    monkeypatch.setenv("PATH", str(tmp_path))
    result = EnvironmentSnapshot(tmp_path / "gone").result()

    assert list(result) == PARTS
    assert "FileNotFoundError" in result["git"]["error"]
    assert result["packages"]["torch"]


@pytest.mark.skipif(os.name == "nt", reason="the fake git is a shell script")
def test_a_part_that_hangs_does_not_hold_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is ready is returned at the time limit; the rest says that it was not in time."""
    os.mkfifo(tmp_path / "never")
    program = tmp_path / "git"
    program.write_text(f"#!/bin/sh\nread line < {tmp_path / 'never'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    snapshot = EnvironmentSnapshot(tmp_path)
    result = snapshot.result(timeout=0.5)

    assert result["git"] == {"error": "not finished in time"}
    assert result["python"]["version"]
    with (tmp_path / "never").open("w") as fifo:  # lets the first of the git calls end
        fifo.write("\n")
    monkeypatch.undo()
    assert snapshot.result(timeout=60)["packages"]["torch"]


def test_the_command_line_is_recorded_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Arguments are kept, tokens and the user's directories are not."""
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(
        sys, "argv", ["/opt/me/train.py", "--lr", "3", "--token", "abc", key, "x" * 5000]
    )
    result = EnvironmentSnapshot(tmp_path).result()["command_line"]

    assert result[:-1] == ["train.py", "--lr", "3", "--token", "[redacted]", "[redacted]"]
    assert len(result[-1]) < 600


def test_the_scheduler_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The job can be found again; other variables are not taken along."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("LSB_JOBID", "18")
    monkeypatch.setenv("SLURM_JWT", "secret")
    scheduler = EnvironmentSnapshot(tmp_path).result()["scheduler"]

    assert scheduler == {"SLURM_JOB_ID": "17", "LSB_JOBID": "18"}


def test_it_is_gathered_once_in_a_daemon_thread(tmp_path: Path):
    """Starting again starts nothing, and each caller gets a copy of its own."""
    snapshot = EnvironmentSnapshot(tmp_path)
    snapshot.start()
    snapshot.start()
    threads = [t for t in threading.enumerate() if t.name == "nshtrainer-environment"]
    assert len(threads) <= 1
    assert all(thread.daemon for thread in threads)
    first = snapshot.result()
    first["packages"].clear()

    assert snapshot.result()["packages"]
    assert snapshot.result()["time"] == first["time"]


def test_a_pickled_snapshot_keeps_what_was_gathered(tmp_path: Path):
    """A spawned process gets the launch's record; an unfinished one is gathered there."""
    snapshot = EnvironmentSnapshot(tmp_path)
    fresh = pickle.loads(pickle.dumps(snapshot))
    result = snapshot.result()

    assert pickle.loads(pickle.dumps(snapshot)).result() == result
    assert fresh.result()["packages"] == result["packages"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_gathers_for_itself():
    """The thread does not come along in a fork; asking there neither hangs nor comes back empty."""
    code = """
        import os
        from nshtrainer.run.environment import EnvironmentSnapshot
        snapshot = EnvironmentSnapshot()
        snapshot._lock.acquire()  # as if the fork came while another thread was starting it
        if os.fork() == 0:
            result = snapshot.result(timeout=30)
            os._exit(0 if result["packages"]["torch"] else 1)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stdout.strip() == "0", done.stderr


def test_no_accelerator_library_is_loaded_and_no_source_is_needed():
    """The record of a program given by `python -c` is complete, and reading it imports no torch."""
    code = """
        import sys
        from nshtrainer.run.environment import EnvironmentSnapshot
        result = EnvironmentSnapshot().result()
        print(result["command_line"], "torch" in sys.modules)
        print([name for name in result if "error" in result[name]])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stdout.split("\n")[:2] == ["['-c'] False", "[]"], done.stderr
