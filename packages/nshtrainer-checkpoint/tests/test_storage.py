from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nshtrainer.files import temporary_path
from nshtrainer_checkpoint.metadata import (
    Record,
    SidecarReader,
    digest,
    is_intact,
    pending_of,
    sidecar_of,
)
from nshtrainer_checkpoint.storage import commit, free_name, point_link, recover, remove

FACTS = {
    "run_id": "r",
    "callback": "last_checkpoint",
    "attempt": 1,
    "save_number": 1,
    "epoch": 0,
    "global_step": 4,
    "save_weights_only": False,
}


def committed(path: Path, content: bytes = b"weights", **facts: object) -> Record:
    temporary = temporary_path(path)
    temporary.write_bytes(content)
    metadata = commit(temporary, path, {**FACTS, **facts})
    return Record.parse(path, metadata)


def read(folder: Path) -> list[Record]:
    return SidecarReader().records(folder)


def test_a_commit_has_size_and_digest(tmp_path: Path):
    """The sidecar says what the file is, and nothing else is left."""
    record = committed(tmp_path / "a.ckpt")

    assert read(tmp_path) == [record]
    assert (record.size, record.sha256) == digest(tmp_path / "a.ckpt")
    assert is_intact(record)
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "a.ckpt.metadata.json"]


def test_a_directory_is_committed_too(tmp_path: Path):
    """A sharded checkpoint is a tree: hashed, committed and removed as a whole."""
    temporary = temporary_path(tmp_path / "a.ckpt")
    (temporary / "sub").mkdir(parents=True)
    (temporary / "sub" / "shard").write_bytes(b"12345")
    record = Record.parse(tmp_path / "a.ckpt", commit(temporary, tmp_path / "a.ckpt", FACTS))

    assert record.size == 5
    assert is_intact(record)
    (tmp_path / "a.ckpt" / "sub" / "shard").write_bytes(b"12346")
    assert not is_intact(record)
    assert remove(record)
    assert os.listdir(tmp_path) == []


def test_one_flipped_bit_is_noticed(tmp_path: Path):
    """A file of the right size but other content is not intact."""
    record = committed(tmp_path / "a.ckpt", b"weights")
    (tmp_path / "a.ckpt").write_bytes(b"weighut")

    assert not is_intact(record)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"checkpoint_filename": "../a.ckpt"}',
        json.dumps({**FACTS, "checkpoint_filename": "a.ckpt", "attempt": None}).encode(),
    ],
)
def test_a_bad_sidecar_is_passed_over(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
):
    """It is warned of once; its checkpoint and the others are left as they are."""
    good = committed(tmp_path / "good.ckpt")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    (tmp_path / "a.ckpt.metadata.json").write_bytes(content)
    reader = SidecarReader()

    assert reader.records(tmp_path) == [good]
    assert reader.records(tmp_path) == [good]
    assert caplog.text.count("no usable metadata") == 1


def test_unknown_keys_of_a_newer_version_are_allowed(tmp_path: Path):
    """A sidecar may hold more than this version knows."""
    assert committed(tmp_path / "a.ckpt", future={"x": 1}) in read(tmp_path)


def test_without_file_or_sidecar_there_is_no_checkpoint(tmp_path: Path):
    """A file alone is unfinished; a sidecar alone is a ghost that blocks nothing."""
    committed(tmp_path / "a.ckpt")
    committed(tmp_path / "b.ckpt")
    (tmp_path / "a.ckpt").unlink()
    sidecar_of(tmp_path / "b.ckpt").unlink()

    assert read(tmp_path) == []


def test_a_free_name_is_taken_by_nothing(tmp_path: Path):
    """A name that exists, with or without metadata, is never used again."""
    committed(tmp_path / "m.ckpt")
    (tmp_path / "m-v1.ckpt").write_bytes(b"the user's")

    assert free_name(tmp_path, "m") == tmp_path / "m-v2.ckpt"


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from nshtrainer.files import temporary_path
from nshtrainer_checkpoint.metadata import Record
from nshtrainer_checkpoint.storage import commit, point_link, remove
folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def hook(event, args):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.symlink") and str(folder) in repr(args):
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
facts = {facts!r}
def save(n):
    path = folder / f"{{n}}.ckpt"
    temporary = temporary_path(path)
    temporary.write_bytes(b"w" * 1000)
    return Record.parse(path, commit(temporary, path, {{**facts, "save_number": n, "global_step": n}}))
old = save(1)
point_link(folder.parent / "last.ckpt", old.path)
(folder.parent / "started").touch()
new = save(2)
point_link(folder.parent / "last.ckpt", new.path)
remove(old)
os._exit(0)
"""


@pytest.mark.slow
def test_a_kill_at_every_file_event_leaves_a_whole_checkpoint(tmp_path: Path):
    """From the first commit on, link and records lead to a complete file; recovery clears the rest."""
    script = tmp_path / "child.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), facts=FACTS))
    kills = 0
    for kill_at in range(1, 200):
        folder = tmp_path / str(kill_at) / "last"
        folder.mkdir(parents=True)
        done = subprocess.run([sys.executable, script, folder, str(kill_at)], check=False)
        if done.returncode == 0:
            break
        kills += 1
        if (folder.parent / "started").exists():
            newest = max(read(folder), key=lambda r: r.order)
            assert is_intact(newest)
            assert (folder.parent / "last.ckpt").resolve().read_bytes() == b"w" * 1000
        recover(folder, lambda record: record.run_id == "r")
        whole = {r.path.name for r in read(folder)}
        assert {p.removesuffix(".metadata.json") for p in os.listdir(folder)} == whole
    assert kills > 10


def test_recovery_leaves_other_runs_alone(tmp_path: Path):
    """What another run was about to commit is not ours to clear."""
    record = committed(tmp_path / "a.ckpt")
    os.replace(sidecar_of(record.path), pending_of(record.path))
    recover(tmp_path, lambda _: False)

    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "a.ckpt.pending.json"]
    recover(tmp_path, lambda _: True)
    assert read(tmp_path) == [record]


def test_only_links_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A folder or file that bears the link's name stays, with its content."""
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"")
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "mine").touch()
    point_link(tmp_path / "last.ckpt", target)

    assert (tmp_path / "last.ckpt" / "mine").exists()
    assert "left alone" in caplog.text
    point_link(tmp_path / "best.ckpt", target)
    assert os.readlink(tmp_path / "best.ckpt") == "a.ckpt"


def test_a_failed_commit_leaves_nothing(tmp_path: Path):
    """If the file cannot be put in place, no pending name stays."""
    (tmp_path / "a.ckpt").mkdir()
    temporary = temporary_path(tmp_path / "a.ckpt")
    temporary.write_bytes(b"x")

    with pytest.raises(IsADirectoryError):
        commit(temporary, tmp_path / "a.ckpt", FACTS)
    assert not pending_of(tmp_path / "a.ckpt").exists()
