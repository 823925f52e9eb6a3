"""What a run ran in: Python, packages, git, hardware, scheduler, command line.

Gathered in the background, so that the first batch never waits for it, and part by part, so that
one that fails or hangs costs only itself. Nothing is read from the model: classes made in a
notebook or by `python -c` have no source file, and the record does not need one.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nshtrainer.run.redaction import redact, secrets_in_environment
from nshtrainer.run.surroundings import git_state, hardware, installed_packages

__all__ = ["EnvironmentSnapshot"]

log = logging.getLogger(__name__)

_SCHEDULER_VARIABLES: Final = (
    *(f"SLURM_{name}" for name in ("CLUSTER_NAME", "JOB_ID", "JOB_NAME", "JOB_PARTITION")),
    *(f"SLURM_{name}" for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_NODELIST", "NNODES")),
    *(f"SLURM_{name}" for name in ("JOB_NUM_NODES", "NTASKS", "NODEID", "PROCID", "LOCALID")),
    *(f"SLURM_{name}" for name in ("RESTART_COUNT", "CPUS_PER_TASK", "GPUS_ON_NODE")),
    *(f"LSB_{name}" for name in ("JOBID", "JOBINDEX", "JOBNAME", "QUEUE", "HOSTS", "DJOB_NUMPROC")),
    "PBS_JOBID",
    "PBS_QUEUE",
)
_MAX_ARGUMENTS = 200
_MAX_TEXT = 500


class EnvironmentSnapshot:
    """The surroundings of a run as plain data: small, JSON-able, without secrets.

    `start` returns at once; `result` waits, but only as long as it is told to. Both may be called
    from any thread and again. The object can be pickled: another process gets what was gathered
    so far, and gathers anew what is missing.

    Parts: `time` (ISO 8601 with zone), `hostname`, `python`, `command_line`, `scheduler`,
    `hardware`, `git`, `packages`. A part that failed, or was not ready in time, is
    `{"error": "..."}`; nothing here raises.

    Args:
        directory: Where to look for a git repository; the current directory by default.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory = Path.cwd() if directory is None else Path(directory).absolute()
        self._found: dict[str, Any] = {}
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        if len(self._found) == len(self._parts()):
            self._done.set()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self._directory, "found": dict(self._found)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._directory = state["directory"]
        self._found = dict(state["found"])
        self._prepare()

    def start(self) -> None:
        """Begin to gather in a daemon thread; does nothing if that was done before."""
        if self._pid != os.getpid():
            self._prepare()  # forked: the thread did not come along, and the lock may be held
        with self._lock:
            if self._thread is not None or self._done.is_set():
                return
            self._thread = threading.Thread(
                target=self._gather, name="nshtrainer-environment", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                log.warning("the environment of the run is not recorded: %s", error)
                self._done.set()

    def result(
        self, timeout: float | None = 30.0, *, packages: tuple[str, ...] = ("",)
    ) -> dict[str, Any]:
        """Return what was gathered, waiting up to *timeout* seconds; `None` waits to the end.

        Starts the gathering if nobody has. Each call returns its own copy.

        Args:
            timeout: In seconds.
            packages: Only those whose names start with one of these; all by default.
        """
        self.start()
        finished = self._done.wait(timeout)
        found = dict(self._found)
        if not finished:
            log.debug("the environment snapshot is not complete after %s s", timeout)
        installed = found.get("packages")
        if installed is not None and "error" not in installed:
            found["packages"] = {n: v for n, v in installed.items() if n.startswith(packages)}
        late = {"error": "could not be gathered" if finished else "not finished in time"}
        return copy.deepcopy({name: found.get(name, late) for name in self._parts()})

    def _gather(self) -> None:
        for name, part in self._parts().items():
            if name in self._found:
                continue
            begin = time.perf_counter()
            self._found[name] = _guarded(part)
            log.debug("environment: %s took %.3f s", name, time.perf_counter() - begin)
        self._done.set()

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """The cheap parts first: a git or file system that hangs delays nothing else."""
        return {
            "time": lambda: datetime.now().astimezone().isoformat(timespec="seconds"),
            "hostname": socket.gethostname,
            "python": _python,
            "command_line": _command_line,
            "scheduler": _scheduler,
            "hardware": hardware,
            "git": lambda: git_state(self._directory),
            "packages": installed_packages,
        }


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        # Package names are no secrets, however they sound, and have versions beside them.
        return part() if part is installed_packages else redact(part())
    except Exception as error:  # noqa: BLE001 -- a record of the surroundings never fails a run
        return {"error": redact(f"{type(error).__name__}: {error}"[:_MAX_TEXT])}


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": Path(sys.executable).name,  # the path tells who the user is
        "platform": platform.platform(),
    }


def _command_line() -> list[str]:
    arguments = list(sys.argv[:_MAX_ARGUMENTS])
    if arguments and os.path.isabs(arguments[0]):
        arguments[0] = Path(arguments[0]).name
    # Redacted before it is cut: half a token no longer looks like one.
    clean: list[str] = redact(arguments, known=secrets_in_environment())
    return [text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..." for text in clean]


def _scheduler() -> dict[str, str]:
    values = {name: os.environ.get(name) for name in _SCHEDULER_VARIABLES}
    return {name: value[:_MAX_TEXT] for name, value in values.items() if value}
