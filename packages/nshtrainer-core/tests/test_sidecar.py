"""A checkpoint file is checked by the metadata beside it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from nshtrainer.sidecar import CHECKSUM_KEY, SIDECAR, SIZE_KEY, damage_of, digest_of

CONTENT = b"weights" * 100


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "a.ckpt"
    path.write_bytes(CONTENT)
    known = {SIZE_KEY: len(CONTENT), CHECKSUM_KEY: hashlib.sha256(CONTENT).hexdigest()}
    Path(f"{path}{SIDECAR}").write_text(json.dumps({**known, **changes}))
    return path


def test_a_file_that_was_saved_so_has_no_damage(tmp_path):
    """Size and SHA-256 are those of the metadata."""
    assert damage_of(write(tmp_path)) is None


@pytest.mark.parametrize("name", ["a.ckpt", "nothing.ckpt"])
def test_without_metadata_nothing_is_known(name, tmp_path):
    """Lightning's own files have none."""
    Path(f"{write(tmp_path)}{SIDECAR}").unlink()
    assert damage_of(tmp_path / name) is None


@pytest.mark.parametrize(
    ("content", "expected"), [(CONTENT[:-1], "size"), (b"W" + CONTENT[1:], "SHA-256")]
)
def test_another_content_is_damage(content, expected, tmp_path):
    """A file that was cut off, and one with a byte that has changed."""
    path = write(tmp_path)
    path.write_bytes(content)
    assert expected in str(damage_of(path))


def test_metadata_of_another_kind_are_damage(tmp_path):
    """A list, say; a text that is no JSON raises."""
    path = write(tmp_path)
    Path(f"{path}{SIDECAR}").write_text("[]")
    assert "no mapping" in str(damage_of(path))
    Path(f"{path}{SIDECAR}").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        damage_of(path)


def test_a_digest_is_that_of_hashlib():
    """Over more than one chunk."""
    content = b"x" * (3 << 20)
    assert digest_of(io.BytesIO(content)) == (len(content), hashlib.sha256(content).hexdigest())
