"""What lies outside of packages: switches in the environment, and the folder of the runs."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .finding import Finding
from .installed import Installed, normalized
from .plugins import plugins_of, split
from .versions import CORE

__all__ = ["check_log_folder", "check_switches"]

_LISTS = ("NSHTRAINER_DISABLE_PLUGINS", "NSHTRAINER_PLUGINS")
_PREFER = "NSHTRAINER_PREFER"
_OTHERS = {
    "NSHTRAINER_PLUGINS_STRICT": "a plugin that fails is an error",
    "NSHTRAINER_RUN_ID": "every run started from here has this id",
    "PYDANTIC_DISABLE_PLUGINS": "pydantic loads no plugins, or not all of them",
}
_CALLBACKS = "NSHTRAINER_CALLBACKS"
_LOG_FOLDER = "nshtrainer_logs"
_LITTLE = 1 << 30


def check_switches(found: Sequence[Installed], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Which switches are in force, and does what they name exist?"""
    known: dict[str, set[str]] = {CORE: set()}
    for one, entry in plugins_of(found):
        known.setdefault(one.name, set()).add(normalized(entry.name))
    findings = [
        *(f for variable in _LISTS for f in _list(variable, environ, known)),
        *_prefer(environ, known),
        *_file(environ),
        *(
            Finding("switches", "ok", f"{variable}={environ[variable]}: {meaning}")
            for variable, meaning in _OTHERS.items()
            if environ.get(variable)
        ),
    ]
    yield from findings or [Finding("switches", "ok", "no switch is set in the environment")]


def _list(
    variable: str, environ: Mapping[str, str], known: Mapping[str, set[str]]
) -> Iterator[Finding]:
    value = environ.get(variable)
    if value is None or (not value.strip() and variable != "NSHTRAINER_PLUGINS"):
        return
    meaning = (
        "these plugins are switched off"
        if variable == "NSHTRAINER_DISABLE_PLUGINS"
        else f"only these and {CORE} are used"
    )
    yield Finding("switches", "ok", f"{variable}={value}: {meaning}")
    names = {*known, *(n for entries in known.values() for n in entries)}
    for part in split(value):
        if part != "*" and normalized(part) not in names:
            yield _unknown(variable, part, names)


def _unknown(variable: str, part: str, names: set[str]) -> Finding:
    close = difflib.get_close_matches(normalized(part), sorted(names), n=1)
    return Finding(
        "switches", "warn", f"{variable} names {part!r}, which is not installed",
        "the name has no effect",
        f"did you mean {close[0]!r}?" if close else "take it out, or install it",
    )  # fmt: skip


def _prefer(environ: Mapping[str, str], known: Mapping[str, set[str]]) -> Iterator[Finding]:
    value = environ.get(_PREFER, "")
    if value.strip():
        yield Finding("switches", "ok", f"{_PREFER}={value}: these names come from these packages")
    for part in split(value):
        name, equals, dist = part.partition("=")
        if not equals or normalized(name) not in known.get(normalized(dist), set()):
            yield Finding(
                "switches", "warn", f"{_PREFER} has the part {part!r}",
                "`name=distribution` is expected, of a distribution that provides the name; this "
                "part has no effect", "correct it; `nshtrainer plugins` lists what there is",
            )  # fmt: skip


def _file(environ: Mapping[str, str]) -> Iterator[Finding]:
    value = environ.get(_CALLBACKS, "").strip()
    if not value:
        return
    if Path(value).is_file():
        yield Finding("switches", "ok", f"{_CALLBACKS}={value}: plain Lightning trainers use it")
    else:
        yield Finding(
            "switches", "fail", f"{_CALLBACKS}={value}, but there is no such file",
            "every Lightning trainer in this environment refuses to start",
            f"correct the path (relative ones start from {_here()}), or unset it",
        )  # fmt: skip


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:  # somebody deleted it
        return Path()


def check_log_folder() -> Iterator[Finding]:
    """Can runs that are started here write?"""
    folder = _here() / _LOG_FOLDER
    place = folder if folder.is_dir() else folder.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
        free = shutil.disk_usage(place).free
    except OSError as error:
        yield Finding(
            "log folder", "fail", f"{place} cannot be written to: {error.strerror or error}",
            f"a run started here writes to {folder}",
            "start elsewhere, or set `directory.project_root` in the config",
        )  # fmt: skip
        return
    free_text = f"{free / (1 << 30):.1f} GiB free"
    if free < _LITTLE:
        yield Finding(
            "log folder", "warn", f"{place} has {free_text}", "checkpoints may not fit",
            "make room, or set `directory.project_root` in the config",
        )  # fmt: skip
    else:
        yield Finding("log folder", "ok", f"{place} can be written to, {free_text}")
