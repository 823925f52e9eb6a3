"""Finding modules, and names in them, without an import."""

from __future__ import annotations

import ast
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

__all__ = ["defines", "find_module"]


def find_module(name: str) -> ModuleSpec | None:
    """The spec of the module *name*; packages above it are not imported, as `find_spec` would.

    A package that changes its `__path__` when it is imported is beyond this.
    """
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for index in range(len(parts)):
        spec = _find(".".join(parts[: index + 1]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return spec


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # noqa: BLE001, S112 -- an import hook of somebody else
            continue
        if spec is not None:
            return spec
    return None


def defines(spec: ModuleSpec, attribute: str) -> bool:
    """Whether the source of *spec* binds *attribute*; True where the source does not tell."""
    if not spec.origin or not spec.origin.endswith(".py"):
        return True
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return bool(bound & {attribute.partition(".")[0], "*", "__getattr__"})
