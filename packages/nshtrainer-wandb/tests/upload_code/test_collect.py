from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nshtrainer_wandb.upload_code.collect import (
    SourceUnknownError,
    collect,
    find_root,
    matches,
)
from nshtrainer_wandb.upload_code.secret_files import is_secret_file


def _write(root: Path, *paths: str, content: str = "x = 1\n") -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)


def _git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def repository(project: Path) -> Path:
    """A repository with tracked, untracked and ignored files."""
    _git(project, "init", "-q")
    _write(project, "tracked.txt", "pkg/train.py", "pkg/data.bin")
    _write(project, ".gitignore", content="ignored/\n*.tmp.py\n")
    _git(project, "add", ".")
    _write(project, "new.py", "new.bin", "ignored/a.py", "b.tmp.py", ".venv.py")
    return project


def test_git_decides_what_is_source(repository: Path):
    """Tracked files of any kind, untracked source files, and nothing that is ignored."""
    expected = [".gitignore", ".venv.py", "new.py", "pkg/data.bin", "pkg/train.py", "tracked.txt"]

    assert list(collect(repository).files) == expected


def test_part_of_a_repository_is_taken_by_itself(repository: Path):
    """A folder below the root gives its own files, with paths from there."""
    assert list(collect(repository / "pkg").files) == ["data.bin", "train.py"]
    assert find_root(repository / "pkg") == repository


def test_folder_that_git_ignores_is_taken_as_one_without_git(repository: Path):
    """A snapshot that a launcher put into an ignored folder can be uploaded when it is named."""
    assert list(collect(repository / "ignored").files) == ["a.py"]


def test_without_git_source_files_are_found(project: Path):
    """Hidden folders, environments, caches and data stay out."""
    _write(project, "a.py", "conf/b.yaml", "Makefile", "requirements-dev.txt")
    _write(project, ".hidden/c.py", "venv/d.py", "my-env/pyvenv.cfg", "my-env/e.py")
    _write(project, "__pycache__/f.py", "data.csv", "nshtrainer_logs/r/g.py")

    expected = ["Makefile", "a.py", "conf/b.yaml", "requirements-dev.txt"]
    assert list(collect(project).files) == expected


def test_include_and_exclude_choose(repository: Path):
    """`include` takes files of any kind, but none that is ignored; `exclude` wins."""
    found = collect(repository, include=["*.bin", "*.py"], exclude=["pkg"])

    assert list(found.files) == [".venv.py", "new.bin", "new.py"]
    assert found.left_out == {"pkg/data.bin": "excluded", "pkg/train.py": "excluded"}


def test_secrets_are_left_out_though_tracked(repository: Path):
    """By name, by a private key inside, and by a secret of the environment inside."""
    _write(repository, ".env", "deploy/id_rsa", "secrets.py", "secrets/x.py", "Prod.ENV")
    _write(repository, "key.py", content="K = '''-----BEGIN RSA PRIVATE KEY-----\nMIIE\n'''")
    _write(repository, "call.py", content="login('hunter2hunter2')")
    _git(repository, "add", "-f", ".")

    found = collect(repository, known_secrets=["hunter2hunter2"])

    secret = {
        ".env",
        "deploy/id_rsa",
        "secrets.py",
        "secrets/x.py",
        "Prod.ENV",
        "key.py",
        "call.py",
    }
    assert secret <= found.left_out.keys()
    assert secret.isdisjoint(found.files)
    assert "pkg/train.py" in found.files


@pytest.mark.parametrize(
    "path",
    ["tokenizer.json", "keys.py", "environment.yml", ".env.example", "src/monkey.py", "token.py"],
)
def test_harmless_names_are_no_secrets(path: str):
    """Words that only look alike do not keep source code back."""
    assert not is_secret_file(path)


def test_links_are_left_out(repository: Path, tmp_path: Path):
    """A link may lead out of the project."""
    (tmp_path / "outside.py").write_text("x = 1")
    (repository / "link.py").symlink_to(tmp_path / "outside.py")

    assert collect(repository).left_out["link.py"] == "it is not a plain file"


def test_sizes_are_capped(project: Path):
    """Large files stay out, and of too many the largest."""
    _write(project, "small.py", content="1" * 10)
    _write(project, "middle.py", content="1" * 50)
    _write(project, "large.py", content="1" * 200)

    assert list(collect(project, max_file_bytes=100).files) == ["middle.py", "small.py"]
    assert list(collect(project, max_total_bytes=59).files) == ["small.py"]


def test_repository_that_git_cannot_read_is_not_guessed_at(project: Path):
    """What git ignores is unknown then, so nothing is chosen."""
    _write(project, "a.py")
    (project / ".git").write_text("gitdir: /nowhere/at/all\n")

    with pytest.raises(SourceUnknownError, match="git cannot list"):
        collect(project)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a/b/c.py", "*.py", True),
        ("a/b/c.py", "b", True),
        ("a/b/c.py", "a/b", True),
        ("a/b/c.py", "./a/b/", True),
        ("a/b/c.py", "a/*.py", True),
        ("a/b/c.py", "b/c.py", False),
        ("a/b/c.py", "c", False),
    ],
)
def test_globs(path: str, pattern: str, expected: bool):
    """A pattern with a slash is compared with the path, one without with each part."""
    assert matches(path, [pattern]) is expected
