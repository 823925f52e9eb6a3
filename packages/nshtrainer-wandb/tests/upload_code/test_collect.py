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

from .secrets import BY_CONTENT, BY_NAME, MARK


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

    assert collect(repository).left_out["link.py"] == "it is a link, or lies behind one"


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


def test_every_planted_secret_is_left_out_with_its_reason(repository: Path):
    """By name and by content, though tracked; the reason says which of the two."""
    for path in BY_NAME:
        _write(repository, path)
    for number, content in enumerate(BY_CONTENT.values()):
        _write(repository, f"pkg/s{number}.py", content=content)
    _git(repository, "add", "-f", ".")

    found = collect(repository)

    by_content = {f"pkg/s{number}.py" for number in range(len(BY_CONTENT))}
    assert set(found.secrets) == {*BY_NAME, *by_content}
    assert {found.left_out[p] for p in BY_NAME} == {"its name is that of a secret"}
    assert all(found.left_out[p].startswith("it holds ") for p in by_content)
    assert not any(MARK in reason for reason in found.left_out.values())


def test_folder_that_became_a_link_is_not_followed(repository: Path, tmp_path: Path):
    """Git still lists the files that were tracked in it, and they would be read from elsewhere."""
    _write(tmp_path / "elsewhere", "train.py", "data.bin")
    (repository / "pkg").rename(tmp_path / "old")
    (repository / "pkg").symlink_to(tmp_path / "elsewhere")

    found = collect(repository)

    assert found.left_out["pkg/train.py"] == "it is a link, or lies behind one"
    assert "pkg" not in "".join(found.files)


def test_root_behind_a_link_is_taken(repository: Path, tmp_path: Path):
    """The folder that is named may be reached by a link; only links below it are refused."""
    (tmp_path / "link").symlink_to(repository)

    assert "pkg/train.py" in collect(tmp_path / "link").files


def test_files_of_submodules_are_taken(repository: Path, tmp_path: Path):
    """They are code of the run as well."""
    _write(tmp_path / "lib", "lib.py")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    _git(tmp_path / "lib", "init", "-q")
    _git(tmp_path / "lib", "add", ".")
    _git(tmp_path / "lib", *identity, "commit", "-qm", "x")
    allow = ("-c", "protocol.file.allow=always")
    _git(repository, *allow, "submodule", "add", "-q", str(tmp_path / "lib"), "lib")

    assert "lib/lib.py" in collect(repository).files


def test_archives_are_left_out(repository: Path):
    """What is inside could not be searched."""
    _write(repository, "backup.tar.gz")
    _git(repository, "add", ".")

    assert "archive" in collect(repository).left_out["backup.tar.gz"]


def test_file_that_is_tracked_and_gone_is_named(repository: Path):
    """Deleted in the working tree, it is no reason to fail."""
    (repository / "tracked.txt").unlink()

    assert collect(repository).left_out["tracked.txt"] == "it is not there"


def test_git_is_asked_about_the_folder_though_the_environment_names_another(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A program that a git hook starts has GIT_DIR set."""
    _git(tmp_path, "init", "-q", "--bare", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))

    assert "pkg/train.py" in collect(repository).files


def test_repository_without_git_installed_is_not_guessed_at(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is ignored cannot be known then; the message says what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(SourceUnknownError, match=r"git.* is not installed; install it, or set"):
        collect(repository)


def test_folder_without_repository_needs_no_git(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Source files are found without it."""
    _write(project, "a.py")
    monkeypatch.setenv("PATH", str(tmp_path))

    assert list(collect(project).files) == ["a.py"]
