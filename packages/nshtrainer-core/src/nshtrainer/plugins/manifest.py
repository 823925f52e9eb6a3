"""The manifest: which names the installed distributions provide, read in one guarded pass.

Nothing is imported here, and one distribution's malformed metadata hides nobody else's names
(the ordinary `entry_points()` raises for everyone).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import importlib_metadata
from typing_extensions import override

from .catalogue import CORE
from .policy import environment_policy, misdirected, normalized

__all__ = [
    "CALLBACKS",
    "GROUPS",
    "HOOKS",
    "LOGGERS",
    "Entry",
    "Manifest",
    "manifest",
    "refresh_plugins",
]

log = logging.getLogger(__name__)

CALLBACKS = "nshtrainer.callbacks"
LOGGERS = "nshtrainer.loggers"
HOOKS = "nshtrainer.plugins"
GROUPS = (CALLBACKS, LOGGERS, HOOKS)
_MONOLITH = "nshtrainer"


@dataclass(frozen=True, order=True)
class Entry:
    """One entry point of ours: *name* of *group* is *value*, provided by the distribution *dist*."""

    group: str
    dist: str
    name: str
    value: str
    distribution: importlib_metadata.Distribution | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def target(self) -> str:
        """`module:qualname` of the object, without the extras and blanks that *value* may have."""
        module, colon, qualname = self.value.partition("[")[0].partition(":")
        return f"{module.strip()}{colon}{qualname.strip()}"

    @property
    def class_name(self) -> str:
        """The last part of the object's name, without an import."""
        return self.target.rpartition(":")[2].rpartition(".")[2]

    @property
    def has_valid_name(self) -> bool:
        """Whether the name may be used in a config: lower case letters, digits, underscores."""
        return re.fullmatch(r"[a-z][a-z0-9_]*", self.name) is not None

    @property
    def version(self) -> str:
        """The version of the distribution; read only when it is shown or recorded."""
        try:
            return (self.distribution.version if self.distribution else None) or "unknown"
        except Exception:  # noqa: BLE001 -- broken metadata must not break who lists it
            return "unknown"

    @property
    def path(self) -> str:
        """The folder that the distribution was found in, or ""."""
        return str(self.distribution.locate_file("")) if self.distribution else ""

    @override
    def __str__(self) -> str:
        return f"{self.dist} {self.version} ({self.value})"


@dataclass(frozen=True)
class Manifest:
    """Every entry of every installed distribution, sorted; immutable and hashable."""

    entries: tuple[Entry, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    """Distributions whose metadata could not be read, each with the error."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def of(self, group: str) -> dict[str, tuple[Entry, ...]]:
        """Name -> entries of *group*; more than one where distributions clash."""
        return _by_name(self, group)

    @property
    def providers(self) -> dict[str, set[str]]:
        """Every name that a config can use -> the distributions that provide it."""
        found: dict[str, set[str]] = {}
        for entry in self.entries:
            if entry.group != HOOKS:
                found.setdefault(entry.name, set()).add(entry.dist)
        return found

    @property
    def digest(self) -> str:
        """A fingerprint of names, values and distributions; equal on ranks that see the same plugins."""
        lines = (f"{e.group}\0{e.dist}\0{e.name}\0{e.value}" for e in self.entries)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@functools.lru_cache(maxsize=16)
def _by_name(of: Manifest, group: str) -> dict[str, tuple[Entry, ...]]:
    names: dict[str, list[Entry]] = {}
    for entry in of.entries:
        if entry.group == group:
            names.setdefault(entry.name, []).append(entry)
    return {name: tuple(entries) for name, entries in names.items()}


def scan() -> Manifest:
    """Read the entry points of all installed distributions, each guarded by itself."""
    global scan_count  # noqa: PLW0603 -- a counter that tests and `doctor` read
    scan_count += 1
    entries: list[Entry] = []
    problems: list[tuple[str, str]] = []
    seen: set[str] = set()
    for distribution in _distributions(problems):
        try:
            text: str = distribution.read_text("entry_points.txt") or ""  # pyright: ignore[reportUnknownMemberType] -- partly untyped there
            if "nshtrainer." not in text:
                continue
            dist = normalized(_name_from_path(distribution) or distribution.name)
            if dist in seen:  # shadowed: an earlier folder of sys.path has it
                continue
            points: Any = distribution.entry_points
            found = [
                Entry(ep.group, dist, ep.name, ep.value, distribution)
                for ep in points
                if ep.group in GROUPS
            ]
        except Exception as error:  # noqa: BLE001 -- any fault in foreign metadata is that one's alone
            name = _name_from_path(distribution) or "unknown"
            problems.append((name, f"{type(error).__name__}: {error}"))
            continue
        seen.add(dist)
        entries += found
    return Manifest(tuple(sorted(set(entries))), tuple(sorted(problems)))


def _distributions(problems: list[tuple[str, str]]) -> Iterable[importlib_metadata.Distribution]:
    found: Any = importlib_metadata.distributions()  # pyright: ignore[reportUnknownMemberType] -- as above
    iterator = iter(found)
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 -- as above; a generator that raised is finished
            problems.append(("sys.path", f"{type(error).__name__}: {error}"))
            return


def _name_from_path(distribution: importlib_metadata.Distribution) -> str:
    """The name that a folder such as `acme_callbacks-1.0.dist-info` states, else "".

    Reading it from the metadata would import and run the parser of e-mails.
    """
    stem, suffix = os.path.splitext(getattr(getattr(distribution, "_path", None), "name", ""))
    return stem.partition("-")[0] if suffix in {".dist-info", ".egg-info"} else ""


scan_count = 0
_lock = threading.RLock()
_current: Manifest | None = None


def manifest() -> Manifest:
    """The manifest of this process; scanned once, when `nshtrainer` is imported."""
    global _current  # noqa: PLW0603 -- one manifest a process
    if _current is None:
        with _lock:
            if _current is None:
                _current = scan()
                _warn_about_monolith()
                _warn_about_unknown_switches(_current)
    return _current


def refresh_plugins() -> Manifest:
    """Scan again, say after a `pip install` in a running notebook; returns the new manifest."""
    global _current  # noqa: PLW0603 -- as above
    importlib_metadata.MetadataPathFinder.invalidate_caches()
    with _lock:
        _current = scan()
    from nshtrainer.registry import forget_all

    forget_all()
    return _current


def _warn_about_unknown_switches(found: Manifest) -> None:
    known = {name for entry in found for name in (entry.dist, entry.name)}
    for name, close in environment_policy().unknown_names(known):
        hint = f"; did you mean {close!r}?" if close else ""
        warnings.warn(
            f"a NSHTRAINER_* switch names the plugin {name!r}, which is not installed{hint}",
            stacklevel=2,
        )
    for problem in misdirected(environment_policy().prefer, found.providers):
        warnings.warn(f"NSHTRAINER_PREFER {problem}", stacklevel=2)


def _warn_about_monolith() -> None:
    """Two distributions own the folder `nshtrainer/` when the monolith is installed beside the core."""
    try:
        importlib_metadata.version(_MONOLITH)
    except Exception:  # noqa: BLE001 -- not there, or unreadable: nothing to warn about
        return
    warnings.warn(
        f"the distribution {_MONOLITH!r} is installed beside {CORE!r}; both own the import package "
        f"`nshtrainer` and overwrite each other's files; run `pip uninstall {_MONOLITH}`, then "
        f"`pip install --force-reinstall {CORE}`",
        stacklevel=2,
    )
