"""Checkpoints in stores behind fsspec: one in memory, and S3 as a real server on loopback speaks it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from upath import UPath

from nshtrainer_checkpoint import objects
from nshtrainer_checkpoint.links import follow, point, pointer_of
from nshtrainer_checkpoint.metadata import (
    Record,
    SidecarReader,
    digest,
    is_intact,
    pending_of,
    sidecar_of,
)
from nshtrainer_checkpoint.places import as_place
from nshtrainer_checkpoint.storage import (
    commit,
    discard,
    free_name,
    make_folder,
    recover,
    remove,
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


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[UPath]:
    """An empty folder in a store."""
    if request.param == "memory":
        yield UPath(f"memory://{uuid4().hex}/run")
        return
    options = {
        "endpoint_url": request.getfixturevalue("s3_endpoint"),
        "key": "testing",
        "secret": "testing",
    }
    # What FSSPEC_S3_ENDPOINT_URL and the others set when fsspec is imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    bucket = f"bucket-{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield UPath(f"s3://{bucket}/run")


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local temporary files of the test are its own."""
    folder = tmp_path / "staging"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def committed(path: Any, content: bytes = b"weights", **facts: Any) -> Record:
    temporary = temporary_for(path)
    temporary.write_bytes(content)
    return Record.parse(path, commit(temporary, path, {**FACTS, **facts}))


def listed(folder: UPath) -> list[str]:
    return sorted(objects.entries(folder))


def left_over(staging: Path) -> list[Path]:
    return [f for f in staging.rglob("*") if f.is_file()]


def test_a_commit_in_a_store(store: UPath, staging: Path):
    """The file, its sidecar, and nothing else, there or here; a URL finds it in another place."""
    record = committed(store / "a.ckpt")
    again = as_place(str(store))

    assert listed(store) == ["a.ckpt", "a.ckpt.metadata.json"]
    assert SidecarReader().records(again) == [record]
    assert is_intact(record)
    assert (record.size, record.sha256) == digest(store / "a.ckpt")
    assert not left_over(staging)


def test_a_tree_is_committed_and_removed_as_a_whole(store: UPath):
    """A sharded checkpoint has the digest that it has on a disk."""
    path = store / "a.ckpt"
    temporary = temporary_for(path)
    (temporary / "sub").mkdir(parents=True)
    (temporary / "sub" / "shard").write_bytes(b"12345")
    (temporary / "top").write_bytes(b"6")
    expected = digest(temporary)
    record = Record.parse(path, commit(temporary, path, FACTS))

    assert (record.size, record.sha256) == expected
    assert is_intact(record)
    assert remove(record)
    assert listed(store) == []


def test_damage_is_noticed(store: UPath):
    """Another size, other content of the same size, and nothing at all."""
    record = committed(store / "a.ckpt", b"weights")
    for content in (b"weigh", b"weighut"):
        objects.write(store / "a.ckpt", content)
        assert not is_intact(record)
    objects.unlink(store / "a.ckpt")
    assert not is_intact(record)


def test_without_its_sidecar_an_upload_does_not_exist(store: UPath):
    """Readers know a checkpoint by its sidecar alone, and a sidecar alone is none."""
    committed(store / "a.ckpt")
    committed(store / "b.ckpt")
    objects.unlink(sidecar_of(store / "a.ckpt"))
    objects.unlink(store / "b.ckpt")

    assert SidecarReader().records(store) == []


def test_a_sidecar_is_read_again_when_it_is_another(store: UPath):
    """Whoever replaced it; the same one is parsed once."""
    reader = SidecarReader()
    first = committed(store / "a.ckpt", global_step=4)
    assert reader.records(store) == [first]
    assert reader.records(store)[0] is reader.records(store)[0]
    data = json.loads(objects.read(sidecar_of(first.path)))
    objects.write(sidecar_of(first.path), json.dumps({**data, "global_step": 44}).encode())

    assert [r.step for r in reader.records(store)] == [44]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_bad_sidecar_in_a_store_is_passed_over(
    store: UPath, content: bytes, caplog: pytest.LogCaptureFixture
):
    """It is warned of once; the others count."""
    good = committed(store / "good.ckpt")
    objects.write(store / "a.ckpt", b"x")
    objects.write(sidecar_of(store / "a.ckpt"), content)
    reader = SidecarReader()

    assert reader.records(store) == [good]
    assert reader.records(store) == [good]
    assert caplog.text.count("no usable metadata") == 1


def test_a_missing_folder_is_empty(store: UPath):
    """Nothing has been saved yet: no records, the first name is free, nothing to recover."""
    make_folder(store)

    assert SidecarReader().records(store) == []
    assert free_name(store, "m") == store / "m.ckpt"
    recover(store, lambda _: True)
    discard(store / "a.ckpt")


def test_a_free_name_in_a_store(store: UPath):
    """Neither a committed nor a foreign nor a planned name is taken."""
    committed(store / "m.ckpt")
    objects.write(store / "m-v1.ckpt", b"the user's")

    assert free_name(store, "m", taken=[store / "m-v2.ckpt"]) == store / "m-v3.ckpt"


def test_recovery_finishes_what_was_uploaded_whole(store: UPath):
    """Killed before the sidecar, after it, or in a removal: what is whole is committed again."""
    record = committed(store / "a.ckpt")
    text = objects.read(sidecar_of(record.path))
    objects.write(pending_of(record.path), text)
    recover(store, lambda _: True)
    assert listed(store) == ["a.ckpt", "a.ckpt.metadata.json"]

    objects.write(pending_of(record.path), text)
    objects.unlink(sidecar_of(record.path))
    recover(store, lambda _: False)
    assert listed(store) == ["a.ckpt", "a.ckpt.pending.json"]
    recover(store, lambda r: r.run_id == "r")
    assert SidecarReader().records(store) == [record]


def test_recovery_clears_what_was_not_and_leaves_what_is_not_ours(store: UPath):
    """A part with our pending name goes; an object without one stays, whatever it is."""
    record = committed(store / "a.ckpt")
    text = objects.read(sidecar_of(record.path))
    objects.unlink(sidecar_of(record.path))
    objects.write(pending_of(record.path), text)
    objects.write(store / "a.ckpt", b"wei")
    objects.write(store / "foreign.ckpt", b"x")
    ghost = committed(store / "ghost.ckpt")
    objects.unlink(ghost.path)
    recover(store, lambda _: True)

    assert listed(store) == ["foreign.ckpt"]


def test_recovery_of_a_replacement_keeps_the_old_one(store: UPath):
    """Killed before the new file replaced the one of the same name: that one is still there."""
    record = committed(store / "a.ckpt")
    data = json.loads(objects.read(sidecar_of(record.path)))
    objects.write(
        pending_of(record.path), json.dumps({**data, "checkpoint_size_bytes": 9}).encode()
    )
    recover(store, lambda _: True)

    assert SidecarReader().records(store) == [record]
    assert listed(store) == ["a.ckpt", "a.ckpt.metadata.json"]


def test_a_link_in_a_store_is_a_pointer(store: UPath, caplog: pytest.LogCaptureFixture):
    """Whatever was asked for; it moves on, and goes when it leads nowhere."""
    a, b = committed(store / "last" / "a.ckpt"), committed(store / "last" / "b.ckpt")
    link = store / "last.ckpt"

    assert follow(link) is None
    for record in (a, b):
        assert point(link, record.path, "symlink") == "pointer"
        assert follow(link) == record.path
    assert json.loads(objects.read(pointer_of(link))) == {"checkpoint": "last/b.ckpt"}
    assert caplog.text.count("made as a pointer") == 1
    point(link, None)
    assert follow(link) == b.path
    remove(b)
    point(link, None)
    assert objects.look(pointer_of(link)) is None


@pytest.mark.parametrize("failing", ["put_file", "pipe_file"])
def test_a_failed_upload_leaves_nothing_and_can_be_tried_again(
    store: UPath, failing: str, monkeypatch: pytest.MonkeyPatch, staging: Path
):
    """The error is an OSError that is tried again; the local file is kept for that."""
    old = committed(store / "a.ckpt")
    path = store / "b.ckpt"
    temporary = temporary_for(path)
    temporary.write_bytes(b"new")
    fs: Any = store.fs

    class NoConnectionError(Exception):
        pass

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise NoConnectionError("the cable is out")

    with monkeypatch.context() as context:
        context.setattr(fs, failing, fail)
        with pytest.raises(OSError, match="NoConnectionError: the cable is out") as caught:
            commit(temporary, path, FACTS)
    assert caught.value.errno == errno.EIO
    assert listed(store) == ["a.ckpt", "a.ckpt.metadata.json"]
    assert left_over(staging) == [temporary]

    new = Record.parse(path, commit(temporary, path, FACTS, digest(temporary)))
    assert sorted(r.path.name for r in SidecarReader().records(store)) == ["a.ckpt", "b.ckpt"]
    assert is_intact(new)
    assert is_intact(old)
    assert not left_over(staging)


def test_a_commit_that_failed_at_its_sidecar_goes_on_there(
    store: UPath, monkeypatch: pytest.MonkeyPatch
):
    """The local file is gone by then; the second try needs it no more."""
    path = store / "a.ckpt"
    temporary = temporary_for(path)
    temporary.write_bytes(b"new")
    known = digest(temporary)
    write = objects.write

    def fail(place: UPath, data: bytes) -> None:
        if place == sidecar_of(path):
            raise OSError(errno.EIO, "gone")
        write(place, data)

    with monkeypatch.context() as context:
        context.setattr(objects, "write", fail)
        with pytest.raises(OSError, match="gone"):
            commit(temporary, path, FACTS, known)
    assert SidecarReader().records(store) == []
    record = Record.parse(path, commit(temporary, path, FACTS, known))

    assert is_intact(record)
    assert listed(store) == ["a.ckpt", "a.ckpt.metadata.json"]


def test_an_upload_of_another_size_is_no_checkpoint(store: UPath, monkeypatch: pytest.MonkeyPatch):
    """What the store says is compared with what was sent."""
    path = store / "a.ckpt"
    temporary = temporary_for(path)
    temporary.write_bytes(b"weights")
    fs: Any = store.fs
    monkeypatch.setattr(fs, "put_file", lambda _, target, **__: fs.pipe_file(target, b"wei"))

    with pytest.raises(OSError, match="3 bytes of the 7"):
        commit(temporary, path, FACTS)
    assert listed(store) == []


def test_a_store_that_cannot_be_reached_is_an_os_error(monkeypatch: pytest.MonkeyPatch):
    """So `on_save_error` and the tries after it apply to it as to a disk."""
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "key": "k",
        "secret": "s",
        "config_kwargs": {"connect_timeout": 1, "retries": {"max_attempts": 0}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        SidecarReader().records(UPath(f"s3://{uuid4().hex}/run"))


UPLOADER = """
import os, sys
from pathlib import Path
from nshtrainer_checkpoint import objects
from nshtrainer_checkpoint.metadata import Record
from nshtrainer_checkpoint.places import as_place
from nshtrainer_checkpoint.links import point
from nshtrainer_checkpoint.storage import commit, remove, temporary_for
folder, kill_at, facts = as_place(sys.argv[1]), int(sys.argv[2]), {facts!r}
seen = 0
def counted(action):
    def act(*args, **kwargs):
        global seen
        seen += 1
        if seen == kill_at:
            os._exit(9)
        return action(*args, **kwargs)
    return act
for name in ("write", "upload", "unlink"):
    setattr(objects, name, counted(getattr(objects, name)))
def save(n):
    path = folder / "last" / f"{{n}}.ckpt"
    temporary = temporary_for(path)
    temporary.write_bytes(b"w" * 1000)
    return Record.parse(path, commit(temporary, path, {{**facts, "save_number": n, "global_step": n}}))
old = save(1)
point(folder / "last.ckpt", old.path, "pointer")
print("started", flush=True)
new = save(2)
point(folder / "last.ckpt", new.path, "pointer")
remove(old)
os._exit(0)
"""


@pytest.mark.slow
def test_a_kill_at_every_request_leaves_a_whole_checkpoint(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: Path
):
    """From the first commit on pointer and records lead to a whole one; recovery clears the rest."""
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    bucket = f"bucket-{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    script = tmp_path / "child.py"
    script.write_text(UPLOADER.format(facts=FACTS))
    surroundings = {
        **os.environ,
        "TMPDIR": str(staging),
        **{f"FSSPEC_S3_{k.upper()}": v for k, v in options.items()},
    }
    kills = 0
    for kill_at in range(1, 40):
        run = UPath(f"s3://{bucket}/{kill_at}")
        done = subprocess.run(
            [sys.executable, script, str(run), str(kill_at)],
            env=surroundings, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        kills += 1
        if "started" in done.stdout:
            newest = max(SidecarReader().records(run / "last"), key=lambda r: r.order)
            pointed = follow(run / "last.ckpt")
            assert is_intact(newest)
            assert isinstance(pointed, UPath)
            assert objects.read(pointed) == b"w" * 1000
        recover(run / "last", lambda record: record.run_id == "r")
        whole = {r.path.name for r in SidecarReader().records(run / "last")}
        names = listed(run / "last")
        assert {n.removesuffix(".metadata.json") for n in names} == whole
        assert not left_over(staging)
    assert kills > 8


@pytest.mark.slow
def test_a_large_file_goes_up_in_parts(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch):
    """More than one part of a multipart upload arrives as it was, by size and SHA-256."""
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    bucket = f"bucket-{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    content = os.urandom(60 << 20)
    record = committed(UPath(f"s3://{bucket}/run/a.ckpt"), content)

    assert record.size == len(content)
    assert is_intact(record)
