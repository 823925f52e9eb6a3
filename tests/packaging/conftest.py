"""Wheels of all packages, and a clean environment that has none of the workspace on its path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
UV = os.environ.get("UV") or shutil.which("uv") or "uv"


def run(*command: str | Path, cwd: Path, check: bool = True, **variables: str) -> str:
    """Run *command* without what this process' environment says about Python and nshtrainer.

    Args:
        command: The program and its arguments.
        cwd: Where it runs.
        check: Whether it must succeed; if not, it must fail.
        variables: Environment variables.

    Returns:
        What it wrote to stdout and stderr.
    """
    ours = ("NSHTRAINER_", "PYTHON", "PYTEST", "PL_", "VIRTUAL_ENV", "UV_PROJECT", "COVERAGE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    kept |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=500,
    )
    assert (done.returncode == 0) is check, f"{command} gave {done.returncode}:\n{done.stdout}"
    return done.stdout


class CleanEnvironment:
    """A virtual environment with nshtrainer-core from its wheel and nothing else of ours.

    Third-party packages have the versions of the lock file, so that uv takes them from its cache.
    """

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder, self.wheels = folder, wheels
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.work = folder.with_name("work")
        self.work.mkdir()
        self.constraints = folder.with_name("constraints.txt")
        everything = ["--all-packages", "--all-extras", "--no-emit-workspace", "--no-hashes"]
        run(UV, "export", "--frozen", "-q", *everything, "-o", self.constraints, cwd=REPOSITORY)
        run(UV, "venv", "-q", "--python", sys.executable, folder, cwd=self.work)
        self.install(self.wheel("nshtrainer-core"))
        self._base = self._versions()

    def wheel(self, dist: str) -> Path:
        """The wheel of one of our distributions."""
        (found,) = self.wheels.glob(f"{dist.replace('-', '_')}-*.whl")
        return found

    def install(self, *requirements: str | Path) -> None:
        """Install *requirements*; our own distributions come from the wheels."""
        ours = ["--find-links", self.wheels, "-c", self.constraints]
        self._pip("install", *ours, *requirements)

    def uninstall(self, *dists: str) -> None:
        """Uninstall *dists*."""
        self._pip("uninstall", *dists)

    def reset(self) -> None:
        """Back to the core alone."""
        if added := self._versions().keys() - self._base.keys():
            self.uninstall(*sorted(added))
        assert self._versions() == self._base

    def run(
        self, program: str, *arguments: str | Path, check: bool = True, **variables: str
    ) -> str:
        """Run one of the environment's programs in an otherwise empty folder."""
        return run(self.bin / program, *arguments, cwd=self.work, check=check, **variables)

    def python(self, code: str, *, check: bool = True, **variables: str) -> str:
        """Run *code*."""
        return self.run("python", "-c", code, check=check, **variables)

    def file(self, name: str, text: str) -> Path:
        """Write a file for a program to read."""
        path = self.work / name
        path.write_text(text, encoding="utf-8")
        return path

    def _versions(self) -> dict[str, str]:
        lines = self._pip("list", "--format", "freeze").splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    def _pip(self, verb: str, *arguments: str | Path) -> str:
        return run(
            UV, "pip", verb, "-q", "--python", self.bin / "python", *arguments, cwd=self.work
        )


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workspace, which nobody edits while it is built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(REPOSITORY / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", ".*", "dist")
    shutil.copytree(REPOSITORY / "packages", folder / "packages", ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def wheels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every package's source distribution and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(UV, "build", "-q", "--all-packages", "-o", folder, cwd=tree)
    return folder


@pytest.fixture(scope="session")
def direct_wheels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every package's wheel, made from the source tree."""
    folder = tmp_path_factory.mktemp("direct")
    run(UV, "build", "-q", "--wheel", "--all-packages", "-o", folder, cwd=tree)
    return folder


@pytest.fixture(scope="session")
def shared_environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    return CleanEnvironment(tmp_path_factory.mktemp("clean") / "venv", wheels)


@pytest.fixture
def environment(shared_environment: CleanEnvironment) -> Iterator[CleanEnvironment]:
    """The core alone, whatever the test before installed."""
    yield shared_environment
    shared_environment.reset()
    shutil.rmtree(shared_environment.work)
    shared_environment.work.mkdir()
