"""Installed plugins for the length of a test: real `*.dist-info` folders on `sys.path`.

Nothing is patched: `importlib.metadata` reads the folders as it reads those of `pip`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.loggers.base import logger_registry
from nshtrainer.plugins.hooks import plugin_manager
from nshtrainer.plugins.manifest import HOOKS, manifest, refresh_plugins
from nshtrainer.plugins.policy import ALLOW, DISABLE, PREFER, STRICT

__all__ = ["EntryPoints", "PluginEnvironment", "plugin_environment"]

EntryPoints = str | Mapping[str, str | Mapping[str, str]]
"""Text of `entry_points.txt`, or group -> lines such as `name = module:Class`, or name -> value."""


@dataclass
class PluginEnvironment:
    """What is installed, and may be used, until the environment is left; see `plugin_environment`.

    Attributes:
        folder: Where distributions are written; it is on `sys.path`.
    """

    folder: Path

    def fake_distribution(
        self,
        name: str,
        entry_points: EntryPoints = "",
        *,
        modules: Mapping[str, str] | None = None,
        version: str = "1.0",
        requires: Iterable[str] = (),
    ) -> Path:
        """Install a distribution and make its plugins known; returns its `dist-info` folder.

        Args:
            name: The distribution's name.
            entry_points: Its entry points; text is written as it is, so it may be malformed.
            modules: Dotted name -> source, which may be indented. A name that others lie below
                becomes a package.
            version: Its version.
            requires: Its requirements, such as `nshtrainer-core>=0.1`.

        Raises:
            FileExistsError: One of this name is there already.
        """
        info = self.folder / f"{re.sub(r'[-_.]+', '_', name)}-{version}.dist-info"
        info.mkdir(parents=True)
        written = [
            _write_module(self.folder, n, s, modules or {}) for n, s in (modules or {}).items()
        ]
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(_entry_points_text(entry_points), encoding="utf-8")
        (info / "INSTALLER").write_text("nshtrainer.testing\n", encoding="utf-8")
        files = [*written, *info.iterdir(), info / "RECORD"]
        record = "".join(f"{file.relative_to(self.folder).as_posix()},,\n" for file in files)
        (info / "RECORD").write_text(record, encoding="utf-8")
        self.refresh()
        return info

    def only(self, *distributions: str) -> None:
        """Let only these distributions (and nshtrainer-core) be used; none at all is allowed."""
        os.environ[ALLOW] = ",".join(distributions)
        self.refresh()

    def refresh(self) -> None:
        """Look at what is installed anew, after files were changed by hand."""
        importlib.invalidate_caches()
        refresh_plugins()


@contextlib.contextmanager
def plugin_environment(folder: Path) -> Generator[PluginEnvironment, None, None]:
    """Give an environment in which plugins can be installed below *folder*; undo all of it after.

    At the end the path, the plugin switches of the environment, imported modules of the fake
    distributions, their registrations and their hooks are as before.

    Args:
        folder: An empty folder, such as `tmp_path`.
    """
    folder = folder.resolve()
    switches = {name: os.environ.get(name) for name in (ALLOW, DISABLE, PREFER, STRICT)}
    path, registered = list(sys.path), _registered()
    states, entries = dict(plugin_manager._states), dict(plugin_manager._entries)  # pyright: ignore[reportPrivateUsage] -- one distribution; put back below
    environment = PluginEnvironment(folder)
    sys.path.insert(0, str(folder))
    try:
        yield environment
    finally:
        for hooks in manifest().of(HOOKS).values():
            for entry in hooks:
                if entry not in states:
                    plugin_manager.unregister(f"{entry.dist}:{entry.name}")
        plugin_manager._states, plugin_manager._entries = states, entries  # pyright: ignore[reportPrivateUsage] -- as above
        sys.path[:] = path
        _restore(switches)
        for name in [n for n, m in sys.modules.items() if _is_below(m, folder)]:
            del sys.modules[name]
        for registry, kept in registered:
            registry.__dict__.update(kept)
        environment.refresh()


def _registered() -> list[tuple[object, dict[str, object]]]:
    """What the registries know now, in a form that can be put back."""
    found: list[tuple[object, dict[str, object]]] = []
    for registry in (callback_registry, logger_registry):
        known: dict[str, dict[str, object]] = vars(registry)
        kept: dict[str, object] = {n: dict(known[n]) for n in ("_override", "_loaded", "_resolved")}
        kept["_local"] = {name: dict(c) for name, c in registry._local.items()}  # pyright: ignore[reportPrivateUsage] -- as above
        found.append((registry, kept))
    return found


def _restore(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _is_below(module: ModuleType | None, folder: Path) -> bool:
    attributes = {} if module is None else vars(module)  # not getattr, which may do anything
    places = [attributes.get("__file__"), *list(attributes.get("__path__") or ())]
    return any(place and Path(place).is_relative_to(folder) for place in places)


def _write_module(folder: Path, name: str, source: str, modules: Mapping[str, str]) -> Path:
    is_package = any(other.startswith(f"{name}.") for other in modules)
    path = folder.joinpath(*name.split("."))
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def _entry_points_text(entry_points: EntryPoints) -> str:
    if isinstance(entry_points, str):
        return textwrap.dedent(entry_points)
    lines: list[str] = []
    for group, members in entry_points.items():
        lines.append(f"[{group}]")
        if isinstance(members, str):
            lines.append(textwrap.dedent(members).strip())
        else:
            lines += [f"{name} = {value}" for name, value in members.items()]
    return "\n".join(lines) + "\n"
