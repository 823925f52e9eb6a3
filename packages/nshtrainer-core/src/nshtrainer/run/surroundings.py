"""The slow parts of the environment snapshot: what is installed, the hardware, the git state.

Each function may raise and may take its time; the snapshot guards both.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["git_state", "hardware", "installed_packages"]

_GIT_TIMEOUT_S = 10.0
_MAX_PACKAGES = 2000


def installed_packages() -> dict[str, str]:
    """Return name to version of every distribution that can be imported from, sorted.

    Read from the names of the metadata directories alone: parsing the metadata of a few hundred
    distributions takes half a second. The first on `sys.path` wins, as for an import.
    """
    found: dict[str, str] = {}
    for place in dict.fromkeys(sys.path):
        for name, version in sorted(_distributions_in(place or ".")):
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(found.items())[:_MAX_PACKAGES])


def _distributions_in(place: str) -> Iterator[tuple[str, str]]:
    try:
        names = os.listdir(place)
    except OSError:  # a zip archive, a path that is gone
        return
    for entry in names:
        stem, extension = os.path.splitext(entry)
        if extension not in (".dist-info", ".egg-info"):
            continue
        name, _, version = stem.partition("-")
        if version:
            yield name, re.sub(r"-py\d(\.\d+)?$", "", version)
        elif (develop := _version_in(os.path.join(place, entry, "PKG-INFO"))) is not None:
            yield name, develop


def _version_in(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("Version:"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return None


def hardware() -> dict[str, Any]:
    """Return processors, memory and accelerators, without waking up any accelerator."""
    affinity = getattr(os, "sched_getaffinity", None)
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "usable_cpu_count": os.cpu_count() if affinity is None else len(affinity(0)),
        "memory_bytes": _memory_bytes(),
        "accelerators": _accelerators(),
    }
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in os.environ:
            result[name] = os.environ[name][:200]
    return result


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _accelerators() -> list[str]:
    """Return accelerator names: from torch where it has CUDA running, else from the driver.

    Asking torch earlier would initialise CUDA, after which data loaders can no longer fork.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names: list[str] = []
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        text = information.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        names.append(match[1].strip() if match else "NVIDIA GPU")
    return names


def git_state(directory: Path) -> dict[str, Any]:
    """Return the state of the git repository around *directory*; `{"root": None}` without one.

    `dirty` counts changes of tracked files only: looking for new files can take minutes.

    Raises:
        FileNotFoundError: git is not installed.
        RuntimeError: git refused; its text is left out, for it holds the user's paths.
        subprocess.TimeoutExpired: git took over 10 s.
    """
    top = _git(directory, "rev-parse", "--show-toplevel")
    if top is None:
        return {"root": None}
    status = _git(directory, "status", "--porcelain=v2", "--branch", "--untracked-files=no") or ""
    head = dict(re.findall(r"^# branch\.(\w+) (.*)$", status, re.MULTILINE))
    remote = _git(directory, "config", "--get", "remote.origin.url", may_exit_with=1)
    detached = head.get("head") == "(detached)"
    return {
        "root": Path(top.strip()).name,
        "commit": None if head.get("oid") == "(initial)" else head.get("oid"),
        "branch": None if detached else head.get("head"),
        "dirty": any(line and not line.startswith("#") for line in status.splitlines()),
        "remote": remote.strip() if remote else None,
    }


def _git(directory: Path, *arguments: str, may_exit_with: int = 0) -> str | None:
    """Run git; `None` if *directory* is in no repository, or on exit status *may_exit_with*."""
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "GIT_OPTIONAL_LOCKS": "0",  # else `status` may make the user's own git command fail
        "GIT_TERMINAL_PROMPT": "0",
    }
    done = subprocess.run(  # noqa: S603 -- a fixed program and our own arguments
        # fsmonitor would start a daemon, or run whatever program the repository names
        ["git", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments],  # noqa: S607 -- the user's git
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=_GIT_TIMEOUT_S,
        check=False,
        env=environment,
    )
    if done.returncode == 0:
        return done.stdout
    if done.returncode == may_exit_with or "not a git repository" in done.stderr:
        return None
    raise RuntimeError(f"git {arguments[0]} exited with status {done.returncode}")
