"""Other implementations of an EMA that are on PyPI, only the modules that have it.

They are not installed into this environment but kept in a folder of their own, without what they
depend on: timm's average needs no torchvision, and nshtrainer 1.5.4 would take our name.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["PEERS", "load_peers"]

_TIMM, _EMA_PYTORCH, _EXISTING = "timm 1.0.31", "ema-pytorch 0.8.3", "nshtrainer 1.5.4"
PEERS = (_TIMM, _EMA_PYTORCH, _EXISTING)
"""Distribution and version of each, as `load_peers` calls them."""
_INSTALL_S = 300


def load_peers(*, install: bool) -> dict[str, Any]:
    """Name -> module with the average, of all that there are.

    They are kept in the user's cache folder (`XDG_CACHE_HOME`).

    Args:
        install: Fetch them if they are missing; says on stderr what hinders it.
    """
    folder = _installed(install=install)
    if folder is None:
        return {}
    _bare_packages(folder, "timm", "timm.utils")
    _bare_packages(folder, "ema_pytorch")
    return {
        _TIMM: importlib.import_module("timm.utils.model_ema"),
        _EMA_PYTORCH: importlib.import_module("ema_pytorch.ema_pytorch"),
        _EXISTING: _existing(folder),
    }


def _installed(*, install: bool) -> Path | None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    requirements = [name.replace(" ", "==") for name in PEERS]
    folder = cache / "nshtrainer-benchmarks" / "-".join(["ema", *requirements])
    is_complete = folder / "complete"
    if is_complete.exists() or not install:
        return folder if is_complete.exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    try:
        subprocess.run(
            [*command, "--python", sys.executable, *requirements],
            check=True,
            capture_output=True,
            text=True,
            timeout=_INSTALL_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        print(f"{', '.join(PEERS)} are left out: {reason}", file=sys.stderr)
        return None
    is_complete.touch()
    return folder


def _bare_packages(folder: Path, *names: str) -> None:
    """Let modules be imported from packages below *folder* without running their `__init__`."""
    for name in names:
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package


def _existing(folder: Path) -> ModuleType:
    """The module of nshtrainer 1.5.4, under another name and without its configuration."""
    name = "nshtrainer_1_5_4"
    package, callbacks = ModuleType(name), ModuleType(f"{name}.callbacks")
    package.__path__ = [str(folder / "nshtrainer")]
    callbacks.__path__ = [str(folder / "nshtrainer" / "callbacks")]
    base: Any = ModuleType(f"{name}.callbacks.base")
    base.CallbackConfigBase = object
    base.callback_registry = SimpleNamespace(register=lambda cls: cls)
    sys.modules.update({module.__name__: module for module in (package, callbacks, base)})
    return importlib.import_module(f"{name}.callbacks.ema")
