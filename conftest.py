"""Runs the Python blocks of the documentation as tests: one namespace for each document.

`skip: next` in a comment leaves a block out, and an `invisible-code-block: python` prepares one.
Where Sybil is missing (one package's tests in an environment of their own), no document is collected.

Files with slow tests begin first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

# The processes that tests start would else compile torch and Lightning anew, each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

SLOW_MARKS = {"slow", "packaging", "distributed"}

DOCUMENTS = ("README.md", "docs/*.md", "packages/*/README.md", "examples/*/README.md")


def enter_document(namespace: dict[str, Any]) -> None:
    """Run a document offline in a folder of its own; what it registers and sets is undone after.

    The repository's `examples` are in that folder too.
    """
    from nshtrainer.testing.plugins import plugin_environment

    namespace["__document__"] = stack = contextlib.ExitStack()
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="document-")))
    stack.callback(_restore_environment, dict(os.environ))
    os.environ["WANDB_MODE"] = "offline"
    stack.callback(os.chdir, Path.cwd())
    os.chdir(folder)
    (folder / "examples").symlink_to(Path(__file__).parent / "examples")
    plugins = folder / ".plugins"
    plugins.mkdir()
    stack.enter_context(plugin_environment(plugins))


def leave_document(namespace: dict[str, Any]) -> None:
    """Undo `enter_document`."""
    namespace.pop("__document__").close()


def _restore_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: a long one that begins last would have a process to itself."""
    slow = Counter(
        item.path for item in items if SLOW_MARKS & {mark.name for mark in item.iter_markers()}
    )
    items.sort(key=lambda item: -slow[item.path])


if importlib.util.find_spec("sybil") is not None:
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()],
        patterns=DOCUMENTS,
        setup=enter_document,
        teardown=leave_document,
    ).pytest()
