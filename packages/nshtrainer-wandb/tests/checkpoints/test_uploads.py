"""What an online run is asked to do. There is no server here: the run and its answers are stand-ins."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import wandb

from nshtrainer_wandb.checkpoints.staging import clear_staged
from nshtrainer_wandb.checkpoints.uploads import CheckpointUploads


class OnlineRun:
    """Notes what is logged, and by which thread."""

    id, offline = "r1", False

    def __init__(self, folder: Path) -> None:
        self.dir = str(folder / "run" / "files")
        self.log: list[tuple[str, Any]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> wandb.Artifact:
        self.gate.wait(10)
        self.threads.add(threading.current_thread().name)
        self.log.append((artifact.metadata["original_filename"], aliases))
        return artifact


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnlineRun:
    """A run whose artifacts can be waited for and deleted."""
    run = OnlineRun(tmp_path)

    def delete(artifact: wandb.Artifact, delete_aliases: bool) -> None:
        assert delete_aliases
        run.log.append((artifact.metadata["original_filename"], "deleted"))

    monkeypatch.setattr(wandb.Artifact, "wait", lambda self, timeout: self)
    monkeypatch.setattr(wandb.Artifact, "delete", delete)
    return run


def _saved(folder: Path, name: str, content: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(content or name)
    return path


def test_training_does_not_wait_for_an_upload(run, tmp_path):
    """A thread does it, which is gone when the uploads are finished."""
    uploads = CheckpointUploads(run, at_once=True)
    run.gate.clear()

    uploads.saved(_saved(tmp_path, "a.ckpt"), {}, best=set())  # would hang here
    assert run.log == []
    run.gate.set()
    uploads.finish(best=set())

    assert run.log == [("a.ckpt", ["latest"])]
    assert run.threads == {"nshtrainer-wandb_0"}
    assert not any(t.name.startswith("nshtrainer-wandb") for t in threading.enumerate())


def test_versions_follow_the_checkpoints_that_are_kept(run, tmp_path):
    """A version is deleted when its checkpoint is, with what was held for it, and not before."""
    uploads = CheckpointUploads(run, at_once=True)
    first, second = _saved(tmp_path, "1.ckpt"), _saved(tmp_path, "2.ckpt")

    uploads.saved(first, {}, best={str(first)})
    uploads.saved(second, {}, best={str(second)})
    uploads.removed(first)
    uploads.finish(best={str(second)})

    assert run.log == [
        ("1.ckpt", ["best", "latest"]),
        ("2.ckpt", ["best", "latest"]),
        ("1.ckpt", "deleted"),
    ]
    held = tmp_path / "run" / "checkpoints"
    assert [p.read_text() for p in held.iterdir()] == ["2.ckpt"]
    clear_staged(run)
    assert not held.exists()


def test_one_content_under_two_names_is_one_version(run, tmp_path):
    """Best and last of one step share it: it gets both aliases, and stays until both are deleted."""
    uploads = CheckpointUploads(run, at_once=True)
    last, best = _saved(tmp_path, "last.ckpt", "x"), _saved(tmp_path, "best.ckpt", "x")
    known = {"checkpoint_checksum": "abc"}

    uploads.saved(last, known, best={str(best)})
    uploads.saved(best, known, best={str(best)})
    uploads.removed(last)
    uploads.finish(best={str(best)})
    assert [what for _, what in run.log] == [["latest"], ["best", "latest"]]
    uploads.removed(best)

    assert [what for _, what in run.log][2:] == ["deleted"]


def test_checkpoint_deleted_before_its_turn_is_not_uploaded(run, tmp_path):
    """An upload that takes longer than the checkpoint lives is left out, not an error."""
    uploads = CheckpointUploads(run, at_once=True)
    run.gate.clear()
    uploads.saved(_saved(tmp_path, "a.ckpt"), {}, best=set())
    short = _saved(tmp_path, "b.ckpt")
    uploads.saved(short, {}, best=set())
    short.unlink()
    uploads.removed(short)
    run.gate.set()
    uploads.finish(best=set())

    assert run.log == [("a.ckpt", ["latest"])]


def test_what_is_left_goes_up_oldest_first(run, tmp_path):
    """So the newest has the alias `latest` in the end; what comes after the end goes up at once."""
    uploads = CheckpointUploads(run, at_once=False)
    for step in (3, 1, 2):
        uploads.saved(_saved(tmp_path, f"{step}.ckpt"), {"global_step": step}, best=set())
    assert run.log == []
    uploads.finish(best={str(tmp_path / "1.ckpt")})
    uploads.saved(_saved(tmp_path, "4.ckpt"), {"global_step": 4}, best=set())
    uploads.finish(best=set())

    assert run.log == [
        ("1.ckpt", ["best", "latest"]),
        ("2.ckpt", ["latest"]),
        ("3.ckpt", ["latest"]),
        ("4.ckpt", ["latest"]),
    ]


def test_checkpoint_on_another_file_system_is_copied_by_wandb(run, tmp_path, monkeypatch):
    """Where no link can be made, W&B's own copy does."""
    import os

    def refuse(*args: Any) -> None:
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    uploads = CheckpointUploads(run, at_once=False)
    uploads.saved(_saved(tmp_path, "a.ckpt"), {}, best=set())
    uploads.finish(best=set())

    assert run.log == [("a.ckpt", ["latest"])]
