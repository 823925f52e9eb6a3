"""Processes that train and save when they are told to, also with another release of nshtrainer."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .method import Sample, Sampler

if TYPE_CHECKING:
    from .checkpoint_worker import Job

__all__ = ["EXISTING", "Processes", "existing_python", "temporary_folder"]

EXISTING = "nshtrainer 1.5.4"
_REQUIREMENTS = ("nshtrainer==1.5.4", "nshconfig==0.56.0", "pydantic==2.11.*")
"""The release, and what it can be imported with."""
_IN_MEMORY = ("tmpfs", "ramfs")
_INSTALL_S = 600


@contextlib.contextmanager
def temporary_folder() -> Generator[Path]:
    """A folder on a disk, for as long as the block runs; `TMPDIR` says on which.

    Raises:
        RuntimeError: It would be in memory, where nothing can be learnt of a disk.
    """
    with tempfile.TemporaryDirectory(prefix="nshtrainer-benchmark-") as name:
        kind = _file_system(Path(name).resolve())
        if kind in _IN_MEMORY:
            raise RuntimeError(
                f"{name} is in memory ({kind}), and this benchmark needs a disk; set TMPDIR to a "
                f"folder on one"
            )
        yield Path(name)


def _file_system(folder: Path) -> str:
    """Type of the file system of *folder*; empty where the system does not tell."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = {Path(point): kind for _, point, kind, *_ in (line.split() for line in lines)}
    return next((mounts[p] for p in (folder, *folder.parents) if p in mounts), "")


def existing_python(*, install: bool) -> Path | None:
    """The interpreter of an environment with the release `EXISTING`, None if there is none.

    It is kept in the user's cache folder (`XDG_CACHE_HOME`).

    Args:
        install: Make the environment if it is missing; says on stderr what hinders it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nshtrainer-benchmarks" / EXISTING.replace(" ", "-")
    python, is_complete = folder / "bin" / "python", folder / "complete"
    if is_complete.exists() or not install:
        return python if is_complete.exists() else None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = _same_as_here()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            ["uv", "venv", "--quiet", "--python", version, str(folder)],
            ["uv", "pip", "install", "--quiet", "--python", str(python), *_REQUIREMENTS, *versions],
            [str(python), "-c", "import nshtrainer"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        print(f"{EXISTING} is left out: it could not be installed: {reason}", file=sys.stderr)
        return None
    is_complete.touch()
    return python


def _same_as_here() -> list[str]:
    """Requirements for what both save with, so that only nshtrainer differs."""
    from importlib.metadata import version

    return [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "lightning")]


class Processes:
    """Starts each process when it is first needed; leaving the block ends them and their files.

    Args:
        existing: Interpreter for jobs of the kind `existing`.
    """

    def __init__(self, existing: Path | None) -> None:
        self._existing = existing
        self._stack = contextlib.ExitStack()
        self._running: dict[str, Connection] = {}
        # A process is forked from one that has torch imported already.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.checkpoint_worker"])

    def __enter__(self) -> Processes:
        self._folder = self._stack.enter_context(temporary_folder())
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def time(self, kind: str, num_bytes: int, num_present: int = 0) -> Sampler:
        """A sampler of how long training stands still for a save."""

        def sample() -> Sample:
            wall, cpu, *_ = self._save("time", kind, num_bytes, num_present)
            return Sample(wall, cpu)

        return sample

    def memory(self, kind: str, num_bytes: int) -> Sampler:
        """A sampler of the extra memory of a save, in bytes; of the state itself for kind `state`."""

        def sample() -> Sample:
            of_state = kind == "state"
            _, _, extra, state = self._save("memory", "bare" if of_state else kind, num_bytes)
            return Sample(float(state if of_state else max(1, extra)), 0.0)

        return sample

    def _save(
        self, question: str, kind: str, num_bytes: int, num_present: int = 0
    ) -> tuple[float, float, int, int]:
        name = f"{kind} {num_bytes} {num_present}"
        if name not in self._running:
            self._running[name] = self._start(name, kind, num_bytes, num_present)
        connection = self._running[name]
        try:
            connection.send(question)
            return connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process that saves as {kind!r} has ended") from error

    def _start(self, name: str, kind: str, num_bytes: int, num_present: int) -> Connection:
        from .checkpoint_worker import Job

        folder = self._folder / name.replace(" ", "-")
        folder.mkdir()
        job = Job(kind, num_bytes, str(folder), num_present)
        return self._start_existing(job) if kind == "existing" else self._fork(job)

    def _fork(self, job: Job) -> Connection:
        from .checkpoint_worker import serve

        here, there = self._context.Pipe()
        process = self._context.Process(target=serve, args=(there, asdict(job)), daemon=True)
        process.start()
        there.close()
        self._stack.callback(process.join)
        self._stack.callback(here.close)
        return cast("Connection", here)

    def _start_existing(self, job: Job) -> Connection:
        worker = Path(__file__).with_name("checkpoint_worker.py")
        address = f"{job.folder}.socket"
        with Listener(address) as listener:
            arguments: list[Any] = [self._existing, worker, address, json.dumps(asdict(job))]
            process = subprocess.Popen(
                arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            connection = listener.accept()
        self._stack.callback(process.wait)
        self._stack.callback(connection.close)
        return cast("Connection", connection)
