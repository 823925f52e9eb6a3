from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nshtrainer.files import temporary_path
from nshtrainer_checkpoint.links import point as point_link
from nshtrainer_checkpoint.metadata import (
    Record,
    SidecarReader,
    digest,
    is_intact,
    pending_of,
    sidecar_of,
)
from nshtrainer_checkpoint.storage import (
    commit,
    explaining,
    free_name,
    recover,
    remove,
    share,
    temporary_for,
)

FACTS = {
    "run_id": "r",
    "callback": "last_checkpoint",
    "attempt": 1,
    "save_number": 1,
    "epoch": 0,
    "global_step": 4,
    "save_weights_only": False,
}
WHOLE = {
    "checkpoint_filename": "a.ckpt",
    "checkpoint_size_bytes": 1,
    "checkpoint_checksum": "0",
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
        b"[" * 100_000,
        b"9" * 5_000,
        b'{"a": ' + b" " * (17 << 20) + b"1}",
        *(
            json.dumps({**FACTS, **WHOLE, "attempt": value}).encode()
            for value in ("1", True, 1.5, -1, 10**30, float("nan"), [1])
        ),
        json.dumps({**FACTS, **WHOLE, "monitor": {"value": "much"}}).encode(),
        json.dumps({**FACTS, **WHOLE, "monitor": [1]}).encode(),
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


@pytest.mark.parametrize(("value", "read_as"), [(None, "None"), ("nan", "nan"), ("inf", "inf")])
def test_a_metric_that_json_has_no_number_for(tmp_path: Path, value: Any, read_as: str):
    """NaN and infinity are kept as text; none is none."""
    record = committed(tmp_path / "a.ckpt", monitor={"name": "m", "value": value})

    assert str(record.value) == read_as
    assert [str(r.value) for r in read(tmp_path)] == [read_as]
    assert "NaN" not in sidecar_of(record.path).read_text()


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "unreadable"])
def test_a_sidecar_that_is_no_file_is_passed_over(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    """It neither blocks nor is read; it is warned of once, and a checkpoint beside it counts."""
    good = committed(tmp_path / "good.ckpt")
    sidecar = sidecar_of(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").touch()
    if kind == "directory":
        sidecar.mkdir()
    elif kind == "pipe":
        os.mkfifo(sidecar)
    elif kind == "loop":
        sidecar.symlink_to(sidecar.name)
    else:
        sidecar.symlink_to("/proc/self/mem")
    reader = SidecarReader()

    for _ in range(2):
        assert reader.records(tmp_path) == [good]
    assert sum(str(sidecar) in message for message in caplog.messages) == 1
    recover(tmp_path, lambda _: True)
    assert read(tmp_path) == [good]


def test_a_folder_may_be_a_symbolic_link(tmp_path: Path):
    """Its checkpoints are found, written and removed through it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real", target_is_directory=True)
    record = committed(tmp_path / "linked" / "a.ckpt")

    assert read(tmp_path / "linked") == [record]
    assert [r.path.parent.name for r in read(tmp_path / "real")] == ["real"]
    assert remove(record)
    assert read(tmp_path / "real") == []


def test_metadata_cannot_lead_out_of_the_folder(tmp_path: Path):
    """A record is where its sidecar lies, whatever name is in it."""
    committed(tmp_path / "secret.ckpt")
    folder = tmp_path / "last"
    folder.mkdir()
    for name in ("../secret.ckpt", str(tmp_path / "secret.ckpt"), "b.ckpt"):
        (folder / "a.ckpt").touch()
        data = {**FACTS, **WHOLE, "checkpoint_filename": name}
        sidecar_of(folder / "a.ckpt").write_text(json.dumps(data))
        assert read(folder) == []
        recover(folder, lambda _: True)
    assert (tmp_path / "secret.ckpt").exists()


# ---- what a reader knows -------------------------------------------------------------------------


def test_a_reader_sees_what_this_process_writes_and_removes(tmp_path: Path):
    """Also a checkpoint that replaces one of the same name between two looks."""
    reader = SidecarReader()
    assert reader.records(tmp_path) == []
    a = committed(tmp_path / "a.ckpt", global_step=1)
    assert reader.records(tmp_path) == [a]
    b = committed(tmp_path / "a.ckpt", global_step=2)
    assert reader.records(tmp_path) == [b]
    remove(b)
    c = committed(tmp_path / "a.ckpt", global_step=3)
    assert reader.records(tmp_path) == [c]
    remove(c)
    assert reader.records(tmp_path) == []


def test_a_sidecar_that_could_not_be_read_is_tried_again(tmp_path: Path):
    """A hiccup of a network file system hides a checkpoint no longer than it lasts."""
    a = committed(tmp_path / "a.ckpt")
    sidecar_of(a.path).rename(tmp_path / "moved")
    sidecar_of(a.path).symlink_to("moved")
    (tmp_path / "moved").rename(tmp_path / "away")
    reader = SidecarReader()
    assert reader.records(tmp_path) == []
    (tmp_path / "away").rename(tmp_path / "moved")

    assert reader.records(tmp_path) == [a]


def test_a_reader_sees_what_others_write_and_remove(tmp_path: Path):
    """In a folder of another process every change of a sidecar counts, in place too."""
    reader = SidecarReader()
    (tmp_path / "a.ckpt").write_bytes(b"x")
    for step in (1, 22):
        data = {**FACTS, **WHOLE, "global_step": step}
        sidecar_of(tmp_path / "a.ckpt").write_text(json.dumps(data))
        assert [r.step for r in reader.records(tmp_path)] == [step]
    (tmp_path / "a.ckpt").unlink()
    assert reader.records(tmp_path) == []
    shutil.rmtree(tmp_path)
    assert reader.records(tmp_path) == []


def test_a_reader_sees_what_appears_and_disappears_beside_its_own(tmp_path: Path):
    """Where this process writes, another one's deletions and additions are noticed all the same."""
    reader = SidecarReader()
    a, b = committed(tmp_path / "a.ckpt"), committed(tmp_path / "b.ckpt")
    assert {r.path for r in reader.records(tmp_path)} == {a.path, b.path}
    code = (
        "import shutil, sys; from pathlib import Path; p = Path(sys.argv[1])\n"
        "text = (p / 'a.ckpt.metadata.json').read_text()\n"
        "(p / 'a.ckpt').unlink()\n"
        "(p / 'c.ckpt').touch()\n"
        "(p / 'c.ckpt.metadata.json').write_text(text.replace('a.ckpt', 'c.ckpt'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)

    assert {r.path.name for r in reader.records(tmp_path)} == {"b.ckpt", "c.ckpt"}


@pytest.mark.slow
def test_known_sidecars_cost_nothing(tmp_path: Path):
    """With 1,000 checkpoints there, a save opens and looks at the same files as with ten."""
    counts: list[int] = []
    switch = {"on": False}
    for present in (10, 1000):
        folder = tmp_path / f"with {present} there"
        folder.mkdir()
        for n in range(present):
            committed(folder / f"n{n}.ckpt", global_step=n)
        reader = SidecarReader()
        reader.records(folder)
        touched = 0

        def hook(event: str, args: tuple[Any, ...], folder: Path = folder) -> None:
            nonlocal touched
            if switch["on"] and event in ("open", "os.listdir", "os.scandir"):
                touched += str(folder) in str(args)

        sys.addaudithook(hook)
        switch["on"] = True
        path = free_name(folder, "n3")
        committed(path)
        found = reader.records(folder)
        switch["on"] = False
        counts.append(touched)
        assert len(found) == present + 1
        assert path.name == "n3-v1.ckpt"
    assert counts[0] == counts[1]


# ---- disks that are full, or worse ---------------------------------------------------------------


def test_a_full_disk_is_told_with_what_is_needed_and_free(tmp_path: Path):
    """Kind and errno stay; the message has file, bytes needed, bytes free and what to do."""
    with (
        pytest.raises(
            OSError, match=r"123 bytes must be written and \d+ are free in .*dirpath"
        ) as e,
        explaining(tmp_path / "a.ckpt", 123),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")

    assert e.value.errno == errno.ENOSPC
    assert e.value.filename == str(tmp_path / "a.ckpt")


@pytest.fixture
def small_files():
    """No file of this process may be larger than a mebibyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("is_tree", [False, True])
def test_a_copy_that_does_not_fit_leaves_nothing(
    tmp_path: Path, is_tree: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """Where links are not possible and there is no room, the partial copy goes."""
    source, target = temporary_path(tmp_path / "a"), temporary_path(tmp_path / "b")
    if is_tree:
        source.mkdir()
    (source / "shard" if is_tree else source).write_bytes(b"x" * (2 << 20))
    request.getfixturevalue("small_files")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="File too large"):
        share(source, target)
    assert os.listdir(tmp_path) == [source.name]


def test_a_sidecar_that_does_not_fit_leaves_the_old_checkpoint(tmp_path: Path, small_files: None):
    """The file is not even renamed; the same commit with room then succeeds."""
    old = committed(tmp_path / "a.ckpt", b"old")
    temporary = temporary_for(tmp_path / "a.ckpt")
    temporary.write_bytes(b"new")
    with pytest.raises(OSError, match=r"3 bytes must be written and \d+ are free") as caught:
        commit(temporary, tmp_path / "a.ckpt", {**FACTS, "metrics": "x" * (2 << 20)})

    assert caught.value.errno == errno.EFBIG
    assert read(tmp_path) == [old]
    assert is_intact(old)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["a.ckpt", "a.ckpt.metadata.json", temporary.name]
    )
    commit(temporary, tmp_path / "a.ckpt", FACTS)
    assert [is_intact(r) for r in read(tmp_path)] == [True]


def test_a_commit_that_failed_at_its_sidecar_goes_on_there(tmp_path: Path):
    """By then the file has its name; tried again, the commit ends; never tried, recovery ends it."""
    sidecar = sidecar_of(tmp_path / "a.ckpt")
    sidecar.mkdir()
    temporary = temporary_for(tmp_path / "a.ckpt")
    temporary.write_bytes(b"new")
    known = digest(temporary)
    with pytest.raises(IsADirectoryError):
        commit(temporary, tmp_path / "a.ckpt", FACTS, known)
    assert not temporary.exists()
    sidecar.rmdir()
    shutil.copytree(tmp_path, tmp_path / "killed")

    record = Record.parse(tmp_path / "a.ckpt", commit(temporary, tmp_path / "a.ckpt", FACTS, known))
    assert is_intact(record)
    assert read(tmp_path) == [record]
    recover(tmp_path / "killed", lambda _: True)
    assert [is_intact(r) for r in read(tmp_path / "killed")] == [True]
    assert not pending_of(tmp_path / "killed" / "a.ckpt").exists()
