from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nshtrainer_checkpoint.links import LinkPolicy, follow, point, pointer_of

POLICIES: list[LinkPolicy] = ["symlink", "hardlink", "copy", "pointer"]


@pytest.fixture
def link(tmp_path: Path) -> Path:
    (tmp_path / "last").mkdir()
    return tmp_path / "last.ckpt"


def checkpoint(link: Path, name: str) -> Path:
    path = link.parent / "last" / f"{name}.ckpt"
    path.write_text(name)
    return path


def refuse(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.EPERM, "not on this file system")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_link_of_each_kind_leads_to_the_newest(link: Path, policy: LinkPolicy):
    """Made, moved on, and followed; nothing but the documented names is left."""
    a, b = checkpoint(link, "a"), checkpoint(link, "b")

    assert follow(link) is None
    assert point(link, a, policy) == policy
    assert follow(link) == a
    assert point(link, b, policy) == policy
    assert follow(link) == b
    if policy != "pointer":
        assert link.read_text() == "b"
    names = {n for n in os.listdir(link.parent) if n != "last"}
    assert names == ({"last.ckpt"} if policy != "pointer" else set()) | (
        {"last.ckpt.pointer.json"} if policy != "symlink" else set()
    )


@pytest.mark.parametrize("before", POLICIES)
@pytest.mark.parametrize("after", POLICIES)
def test_another_policy_replaces_what_the_one_before_made(
    link: Path, before: LinkPolicy, after: LinkPolicy
):
    """A run that is resumed with another setting has one link, and it is right."""
    a, b = checkpoint(link, "a"), checkpoint(link, "b")
    point(link, a, before)

    assert point(link, b, after) == after
    assert follow(link) == b
    assert os.path.lexists(link) == (after != "pointer")
    assert link.is_symlink() == (after == "symlink")


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_right_is_not_written_again(link: Path, policy: LinkPolicy):
    """A copy of many gigabytes is made once."""
    a = checkpoint(link, "a")
    point(link, a, policy)
    names = [n for n in (link, pointer_of(link)) if os.path.lexists(n)]
    before = [os.lstat(n).st_ino for n in names]
    point(link, a, policy)

    assert [os.lstat(n).st_ino for n in names] == before


def test_a_checkpoint_of_the_same_name_is_linked_again(link: Path):
    """The name alone does not tell: the file behind it may be a new one."""
    point(link, checkpoint(link, "a"), "copy")
    path = link.parent / "last" / "a.ckpt"
    path.unlink()
    path.write_text("another")
    point(link, path, "copy")

    assert link.read_text() == "another"


@pytest.mark.parametrize(
    ("impossible", "made"),
    [(["symlink"], "hardlink"), (["symlink", "link"], "copy")],
)
def test_what_a_file_system_cannot_do_falls_back(
    link: Path,
    impossible: list[str],
    made: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """The link works nevertheless, and one warning says what it is."""
    for name in impossible:
        monkeypatch.setattr(os, name, refuse)
    for name in ("a", "b"):
        assert point(link, checkpoint(link, name), "symlink") == made
        assert link.read_text() == name
        assert not link.is_symlink()
    assert caplog.text.count(f"made as a {made}") == 1


def test_a_directory_gets_a_pointer_where_symbolic_links_are_not_possible(
    link: Path, monkeypatch: pytest.MonkeyPatch
):
    """A sharded checkpoint is neither hard-linked nor copied."""
    target = link.parent / "last" / "a.ckpt"
    target.mkdir()
    monkeypatch.setattr(os, "symlink", refuse)

    assert point(link, target, "symlink") == "pointer"
    assert follow(link) == target
    assert json.loads(pointer_of(link).read_text()) == {"checkpoint": "last/a.ckpt"}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_we_did_not_make_stays(
    link: Path, policy: LinkPolicy, caplog: pytest.LogCaptureFixture
):
    """A file of the user's under the link's name keeps its content; so does one put over ours."""
    a, b = checkpoint(link, "a"), checkpoint(link, "b")
    link.write_text("mine")

    assert point(link, a, policy) == "none"
    assert "left alone" in caplog.text
    link.unlink()
    point(link, a, policy)
    if policy in ("hardlink", "copy"):
        link.unlink()
        link.write_text("mine")
        assert point(link, b, policy) == "none"
        assert link.read_text() == "mine"


@pytest.mark.parametrize("policy", POLICIES)
def test_only_a_link_that_leads_nowhere_is_removed(link: Path, policy: LinkPolicy):
    """A hard link or a copy is itself the last one there is of a checkpoint that was deleted."""
    a = checkpoint(link, "a")
    point(link, a, policy)
    point(link, None, policy)
    assert follow(link) == a
    a.unlink()
    point(link, None, policy)

    assert follow(link) == (link if policy in ("hardlink", "copy") else None)
    assert os.path.lexists(link) == (policy in ("hardlink", "copy"))


def test_none_does_nothing(link: Path):
    """Whoever wants no links gets none."""
    assert point(link, checkpoint(link, "a"), "none") == "none"
    assert os.listdir(link.parent) == ["last"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"checkpoint": 3}',
        b'{"checkpoint": "../secret.ckpt"}',
        b'{"checkpoint": "last/../../secret.ckpt"}',
        b'{"checkpoint": "/etc/passwd"}',
        b'{"checkpoint": "s3://bucket/x.ckpt"}',
        b'{"checkpoint": "."}',
        b"[" * 100_000,
    ],
)
def test_a_pointer_leads_only_downwards(tmp_path: Path, content: bytes):
    """What somebody wrote into it reaches no other file, and stops nothing."""
    (tmp_path / "secret.ckpt").touch()
    link = tmp_path / "run" / "last.ckpt"
    (tmp_path / "run" / "last").mkdir(parents=True)
    pointer_of(link).write_bytes(content)

    assert follow(link) is None
