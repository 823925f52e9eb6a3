"""Installed distributions, read folder by folder so that no faulty one hides another.

`importlib.metadata` is not used: its ways of failing differ from one Python to the next, and it does
not show an empty leftover folder, which is one of the things to be found.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EntryPoint", "Installed", "by_name", "installed", "normalized"]

_VALUE = re.compile(r"[\w.]+\s*(:\s*[\w.]+\s*)?(\[.*\]\s*)?")


def normalized(name: str) -> str:
    """The name under which distributions are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


@dataclass(frozen=True)
class EntryPoint:
    """One line of `entry_points.txt`."""

    group: str
    name: str
    value: str

    @property
    def module(self) -> str:
        """The module that the entry point names."""
        return self.value.partition("[")[0].partition(":")[0].strip()

    @property
    def attribute(self) -> str:
        """The object in the module that the entry point names, or ""."""
        return self.value.partition("[")[0].partition(":")[2].strip()


@dataclass(frozen=True)
class Installed:
    """One `*.dist-info` or `*.egg-info` on `sys.path`.

    Attributes:
        path: The folder (or, for an old egg-info, the file) with the metadata.
    """

    path: Path

    @property
    def folder(self) -> Path:
        """The folder of `sys.path` that it lies in."""
        return self.path.parent

    @functools.cached_property
    def _metadata(self) -> tuple[str | None, str]:
        if self.path.is_file():
            return _text(self.path)
        text, problem = _text(self.path / "METADATA")
        return (text, problem) if text is not None or problem else _text(self.path / "PKG-INFO")

    @functools.cached_property
    def _fields(self) -> tuple[tuple[str, str], ...]:
        head = (self._metadata[0] or "").replace("\r\n", "\n").partition("\n\n")[0]
        pairs = (line.partition(":") for line in head.splitlines() if line[:1].strip())
        return tuple((key.strip().lower(), value.strip()) for key, colon, value in pairs if colon)

    def field(self, key: str) -> str | None:
        """The first value of the metadata field *key* (lower case), None if there is none."""
        return next((v for k, v in self._fields if k == key), None)

    @property
    def name(self) -> str:
        """The distribution's name, normalized; without metadata, the folder's."""
        return normalized(self.field("name") or self.path.stem.partition("-")[0])

    @property
    def version(self) -> str:
        """The version, or `unknown`."""
        return self.field("version") or "unknown"

    @property
    def requires(self) -> list[str]:
        """Every `Requires-Dist`."""
        return [v for k, v in self._fields if k == "requires-dist"]

    @property
    def is_empty(self) -> bool:
        """Whether the folder holds no file at all, as an interrupted uninstall leaves it."""
        try:
            return self.path.is_dir() and not any(self.path.iterdir())
        except OSError:
            return False

    @property
    def is_editable(self) -> bool:
        """Whether it was installed with `pip install -e`."""
        text, _ = _text(self.path / "direct_url.json")
        try:
            return bool(json.loads(text or "{}")["dir_info"]["editable"])
        except (ValueError, KeyError, TypeError):
            return False

    @property
    def metadata_problem(self) -> str:
        """What is wrong with the metadata, or ""."""
        text, problem = self._metadata
        if problem:
            return f"METADATA {problem}"
        if text is None:
            return "there is no METADATA"
        missing = [key for key in ("name", "version") if not self.field(key)]
        return f"METADATA has no {' and no '.join(missing)}" if missing else ""

    @functools.cached_property
    def entry_points_text(self) -> tuple[str | None, str]:
        """The text of `entry_points.txt` (None if there is none), and what is wrong with it."""
        return _text(self.path / "entry_points.txt") if self.path.is_dir() else (None, "")

    @functools.cached_property
    def entry_points_problem(self) -> str:
        """What makes `importlib.metadata.entry_points()` raise, or ""."""
        text, problem = self.entry_points_text
        if problem or text is None:
            return problem
        section = False
        for number, line in _lines(text):
            if _is_header(line):
                section = True
            elif section and "=" not in line:
                return f"line {number} is {line!r}, where `name = module:object` is expected"
        return ""

    @functools.cached_property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        """The entry points that can be read."""
        group, found = "", list[EntryPoint]()
        for _, line in _lines(self.entry_points_text[0] or ""):
            if _is_header(line):
                group = line[1:-1].strip()
            elif group and "=" in line:
                name, _, value = line.partition("=")
                found.append(EntryPoint(group, name.strip(), value.strip()))
        return tuple(found)

    @property
    def odd_values(self) -> list[EntryPoint]:
        """Entry points whose value is not `module:object`."""
        return [e for e in self.entry_points if _VALUE.fullmatch(e.value) is None]

    def __str__(self) -> str:  # pyright: ignore[reportImplicitOverride] -- typing.override is newer than Python 3.10
        return f"{self.name} {self.version}"


def _is_header(line: str) -> bool:
    return line.startswith("[") and line.endswith("]")


def _lines(text: str) -> Iterable[tuple[int, str]]:
    stripped = ((n, line.strip()) for n, line in enumerate(text.splitlines(), 1))
    return ((n, line) for n, line in stripped if line and not line.startswith("#"))


def _text(path: Path) -> tuple[str | None, str]:
    """The text of *path* (None if it is not there), and what is wrong with it."""
    try:
        return path.read_text(encoding="utf-8"), ""
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None, ""
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start})"
    except OSError as error:
        return None, f"cannot be read ({error.strerror or error})"


def installed(path: Sequence[str]) -> list[Installed]:
    """Every distribution in the folders of *path*, in their order: of one name, the first counts."""
    found: list[Installed] = []
    seen: set[Path] = set()
    for part in path:
        folder = Path(part or ".")
        try:
            folder = folder.resolve()
            if folder in seen or not folder.is_dir():
                continue
            seen.add(folder)
            children = sorted(folder.iterdir())
        except OSError:
            continue
        found += [Installed(c) for c in children if c.suffix in {".dist-info", ".egg-info"}]
    return found


def by_name(found: Iterable[Installed]) -> dict[str, Installed]:
    """Name -> the first readable distribution of that name."""
    names: dict[str, Installed] = {}
    for one in found:
        if not one.metadata_problem:
            names.setdefault(one.name, one)
    return names
