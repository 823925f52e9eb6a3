from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from nshtrainer import DirectoryConfig
from nshtrainer.errors import ConfigError
from nshtrainer.run.directory import RunDirectory
from nshtrainer.run.run import Run


def test_paths_follow_the_documented_form_and_create_nothing(tmp_path: Path):
    """Asking where something will be leaves the disk alone."""
    directory = RunDirectory(tmp_path, run_id="abc")

    assert directory.root == tmp_path / "nshtrainer_logs" / "abc"
    assert directory.subdirectory("checkpoint") == directory.root / "checkpoint"
    assert RunDirectory(tmp_path, "abc", basename="runs").root == tmp_path / "runs" / "abc"
    assert list(tmp_path.iterdir()) == []


def test_ensure_makes_the_path_and_keeps_git_away(tmp_path: Path):
    """The first write makes what is needed; git never sees the runs."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    directory = RunDirectory(tmp_path / "project", "abc")

    assert directory.ensure() == directory.root
    log = directory.ensure("log")
    assert log == directory.root / "log"
    assert log.is_dir()
    (log / "metrics.csv").write_text("x")
    status = subprocess.run(
        ["git", "-C", str(tmp_path), "status", "--porcelain"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert status.stdout == ""


def test_an_existing_gitignore_is_left_alone(tmp_path: Path):
    """What the user wrote there stays."""
    ignore = tmp_path / "nshtrainer_logs" / ".gitignore"
    ignore.parent.mkdir()
    ignore.write_text("*.ckpt\n")
    RunDirectory(tmp_path, "abc").ensure("log")

    assert ignore.read_text() == "*.ckpt\n"


def test_many_may_ensure_at_once(tmp_path: Path):
    """Ranks race for the same directory and none of them fails."""
    errors: list[BaseException] = []

    def ensure() -> None:
        try:
            RunDirectory(tmp_path, "abc").ensure("checkpoint")
        except BaseException as error:  # noqa: BLE001 -- reported below
            errors.append(error)

    threads = [threading.Thread(target=ensure) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    base = tmp_path / "nshtrainer_logs"
    assert sorted(path.name for path in base.iterdir()) == [".gitignore", "abc"]
    assert "*" in (base / ".gitignore").read_text().splitlines()


def test_a_later_chdir_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative project is where it was when the run was described."""
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(Path("project"), "abc")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert directory.root == tmp_path / "project" / "nshtrainer_logs" / "abc"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "..\\x", "/abs", "a\nb"])
def test_names_that_are_more_than_one_component_are_refused(tmp_path: Path, name: str):
    """Nothing of a run lands outside its directory."""
    with pytest.raises(ConfigError, match="without separators"):
        RunDirectory(tmp_path, "abc").subdirectory(name)
    with pytest.raises(ConfigError, match="without separators"):
        RunDirectory(tmp_path, "abc", basename=name)
    with pytest.raises(ConfigError, match="leave it out"):
        RunDirectory(tmp_path, name)


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Found when the run writes, so that a file of a configuration fits every machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = DirectoryConfig(project_root=Path("~/x"))

    assert Run(directory, "abc").directory.root == tmp_path / "x" / "nshtrainer_logs" / "abc"
    assert "~" in directory.to_text()
    with pytest.raises(ConfigError, match="write the path without `~`"):
        _ = Run(DirectoryConfig(project_root=Path("~no-such-user/x")), "abc").directory


def test_a_root_that_no_system_takes_is_refused_by_the_config():
    """A NUL is a mistake in whatever wrote the file."""
    with pytest.raises(ValueError, match=r"project_root\n.*holds a NUL"):
        DirectoryConfig(project_root=Path("a\0b"))
