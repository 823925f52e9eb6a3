"""Runs the Python blocks of the documentation as tests: one namespace for each document.

`skip: next` in a comment leaves a block out, and an `invisible-code-block: python` prepares one.
Where Sybil is missing (one package's tests in an environment of their own), no document is collected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
DOCUMENTS = ("README.md", "docs/*.md", "packages/*/README.md")


def enter_document(namespace: dict[str, Any]) -> None:
    """Run a document in a folder and a module of its own, offline; what it registers goes with it."""
    from nshtrainer.testing import plugin_environment

    stack = contextlib.ExitStack()
    namespace["__document__"] = stack
    folder = stack.enter_context(TemporaryDirectory(prefix="document-"))
    stack.callback(os.chdir, Path.cwd())
    os.chdir(folder)
    stack.callback(_restore, "WANDB_MODE", os.environ.get("WANDB_MODE"))
    os.environ["WANDB_MODE"] = "offline"
    plugins = Path(folder) / ".plugins"
    plugins.mkdir()
    stack.enter_context(plugin_environment(plugins))
    # A class looks its annotations up in the module that it names.
    module = types.ModuleType("document")
    module.__dict__.update(namespace)
    namespace["__name__"] = module.__name__
    module.__dict__.clear()
    sys.modules[module.__name__] = _Module(namespace)
    stack.callback(sys.modules.pop, module.__name__, None)


def leave_document(namespace: dict[str, Any]) -> None:
    """Undo `enter_document`."""
    namespace.pop("__document__").close()
