from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint.places import as_place, checked_place, is_remote, is_url


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("a/b", Path("a/b")),
        ("/a b/c", Path("/a b/c")),
        (Path("/a"), Path("/a")),
        ("file:///a%20b/c", Path("/a b/c")),
        ("file://localhost/a", Path("/a")),
        ("FILE:///a", Path("/a")),
        (UPath("/a"), Path("/a")),
        (UPath("file:///a"), Path("/a")),
        ("a:b/c", Path("a:b/c")),
    ],
)
def test_what_lies_on_this_machine_is_a_path(value: Any, path: Path):
    """Text, paths and `file://` URLs become one and the same kind of thing."""
    place = as_place(value)

    assert place == path
    assert type(place) is type(Path())
    assert not is_remote(place)


@pytest.mark.parametrize("url", ["memory://a/b", "memory://a/b/", "MEMORY://a/b"])
def test_a_url_keeps_its_slashes(url: str):
    """It never goes through `pathlib.Path`, which would make `memory:/a/b` of it."""
    place = as_place(url)

    assert is_remote(place)
    assert str(place / "c.ckpt") == "memory://a/b/c.ckpt"
    assert as_place(place) is place
    assert checked_place(url) == "memory://a/b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty text"),
        (Path("s3://bucket/run"), "drops a slash"),
        ("s3:/bucket/run", "drops a slash"),
        ("file://server/share", "three slashes"),
        ("memory://", "names no folder"),
        ("s3:///", "names no folder"),
        ("simplecache::s3://bucket/run", "chains file systems"),
    ],
)
def test_what_cannot_be_meant_is_refused(value: Any, message: str):
    """A folder `s3:` in the working directory is nobody's wish."""
    with pytest.raises(ConfigError, match=message):
        checked_place(value)
    with pytest.raises(ConfigError, match=message):
        as_place(value)


def test_an_unknown_scheme_is_refused_at_once():
    """Not only when the first checkpoint is uploaded."""
    with pytest.raises(ConfigError, match=r"nowhere://a.*(URL that fsspec knows|not installed)"):
        as_place("nowhere://a")


def test_is_url_is_about_text_alone():
    """A path is none, whatever it looks like."""
    assert is_url("s3://b/c")
    assert not is_url("C:\\runs")
    assert not is_url(Path("s3://b"))


def test_a_missing_library_is_named_with_the_command():
    """Without universal-pathlib a URL is a ConfigError, and a path works."""
    code = (
        "import sys\n"
        "sys.modules['upath'] = None\n"
        "from nshtrainer_checkpoint.places import as_place\n"
        "assert as_place('a/b').name == 'b'\n"
        "try:\n"
        "    as_place('s3://bucket/run')\n"
        "except Exception as error:\n"
        "    assert type(error).__name__ == 'ConfigError', error\n"
        "    assert 'nshtrainer-checkpoint[remote]' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["places", "metadata", "storage", "links"])
def test_nothing_heavy_comes_with_the_module(module: str):
    """Neither fsspec nor universal-pathlib nor torch is loaded before a URL needs it."""
    code = (
        f"import sys, nshtrainer_checkpoint.{module} as m\n"
        "assert not {'fsspec', 'upath', 'torch', 'lightning', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
