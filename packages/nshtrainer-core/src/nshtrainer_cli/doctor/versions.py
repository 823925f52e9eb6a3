"""Versions: Python, the core, its requirements and families, all from metadata."""

from __future__ import annotations

import operator
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .finding import Finding
from .installed import Installed, by_name, normalized

__all__ = ["CORE", "check_versions", "families_of", "meets"]

CORE = "nshtrainer-core"
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(;.*)?")


def check_versions(found: Sequence[Installed]) -> Iterator[Finding]:
    """Is everything there, in versions that go together?"""
    names = by_name(found)
    core = names.get(CORE)
    if core is None:
        yield Finding(
            "versions", "fail", f"{CORE} is not among the installed distributions",
            "its metadata is missing or unreadable, so no plugin of it is found",
            f"pip install --force-reinstall {CORE}",
        )  # fmt: skip
        return
    wanted = core.field("requires-python") or ""
    python = platform.python_version()
    is_met = meets(python, wanted)
    yield Finding(
        "versions", "ok" if is_met else "fail",
        f"Python {python}, {CORE} {core.version}{' (editable)' if core.is_editable else ''}",
        "" if is_met else f"{CORE} needs Python {wanted}",
        "" if is_met else "make an environment with a newer Python",
    )  # fmt: skip
    yield from _requirements(core, names)
    yield from _families(core, names)


def parse(requirement: str) -> tuple[str, str, str]:
    """Name, version range and marker of a `Requires-Dist`."""
    match = _REQUIREMENT.fullmatch(requirement.strip())
    if match is None:
        return normalized(requirement), "", ""
    name, wanted, marker = match.groups(default="")
    return normalized(name), wanted.strip(), marker


def meets(version: str, wanted: str) -> bool:
    """Whether *version* lies in the range *wanted* (`>=2,<3`), compared by its numbers alone.

    What cannot be compared that way counts as met: pip is the judge, this is a first look.
    """
    have = _numbers(version)
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|>|<)\s*(\d+(?:\.\d+)*)\s*", part)
        if match is None or have is None:
            continue
        limit = _numbers(match[2]) or ()
        size = max(len(have), len(limit))
        padded = [(*n, *(0,) * (size - len(n))) for n in (have, limit)]
        if not _TESTS[match[1]](*padded):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...] | None:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else None


def _requirements(core: Installed, names: Mapping[str, Installed]) -> Iterator[Finding]:
    have: list[str] = []
    for requirement in core.requires:
        name, wanted, marker = parse(requirement)
        if marker:
            continue
        one = names.get(name)
        if one is None:
            yield Finding(
                "versions", "fail", f"{name} is not installed",
                f"{CORE} {core.version} needs it ({requirement})", f"pip install '{name}{wanted}'",
            )  # fmt: skip
        elif not meets(one.version, wanted):
            yield Finding(
                "versions", "fail", f"{name} {one.version} is installed",
                f"{CORE} {core.version} needs {requirement}", f"pip install '{name}{wanted}'",
            )  # fmt: skip
        else:
            have.append(str(one))
    if have:
        yield Finding("versions", "ok", ", ".join(have))


def families_of(core: Installed) -> dict[str, str]:
    """The first-party families that the core's extras name, each with its version range."""
    parsed = (parse(r) for r in core.requires)
    return {n: w for n, w, _ in parsed if n.startswith("nshtrainer-") and n != CORE}


def _families(core: Installed, names: Mapping[str, Installed]) -> Iterator[Finding]:
    families = families_of(core)
    have = [names[n] for n in sorted(families) if n in names]
    missing = sorted(set(families) - set(names))
    yield Finding(
        "families", "ok",
        (", ".join(map(str, have)) or "none is installed")
        + (f"; not installed: {', '.join(missing)}" if missing else ""),
        do=f"to have what is not installed: pip install {' '.join(missing)}" if missing else "",
    )  # fmt: skip
    for one in have:
        unmet = _unmet(core, one, families[one.name])
        if unmet:
            yield Finding(
                "lockstep", "fail", f"{one} is installed beside {core}", unmet,
                f"pip install --upgrade {CORE} {one.name}",
            )  # fmt: skip
        elif one.version != core.version:
            yield Finding(
                "lockstep", "warn", f"{one} is installed beside {core}",
                "core and families are released, and tested, in equal versions",
                f"pip install --upgrade {CORE} {one.name}",
            )  # fmt: skip


def _unmet(core: Installed, family: Installed, wanted: str) -> str:
    if not meets(family.version, wanted):
        return f"{CORE} {core.version} goes with {family.name}{wanted}"
    for requirement in family.requires:
        name, of_core, marker = parse(requirement)
        if name == CORE and not marker and not meets(core.version, of_core):
            return f"{family} was made for {CORE}{of_core}"
    return ""
