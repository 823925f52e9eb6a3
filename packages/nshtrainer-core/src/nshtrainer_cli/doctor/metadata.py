"""Metadata of every distribution: malformed, empty, twice, or claiming our import package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .finding import Finding
from .installed import Installed, by_name
from .modules import find_module
from .versions import CORE, parse

__all__ = ["check_metadata"]

_MONOLITH = "nshtrainer"
_EVERYBODY = (
    "`importlib.metadata.entry_points()` raises for every program in this environment; pydantic "
    "calls it, so nothing that defines a pydantic model can be imported, nshtrainer included"
)


def check_metadata(found: Sequence[Installed]) -> Iterator[Finding]:
    """Can everything be read, and is everything there once?"""
    problems = [*_malformed(found), *_twice(found)]
    yield from problems
    if not problems:
        yield Finding(
            "metadata", "ok", f"{len(found)} distributions can be read, each is there once"
        )
    yield from _import_package(found)


def _malformed(found: Sequence[Installed]) -> Iterator[Finding]:
    ours = _ours(found)
    for one in found:
        if one.entry_points_problem:
            yield Finding(
                "metadata", "fail",
                f"entry_points.txt of {one} ({one.path}) {_sentence(one.entry_points_problem)}",
                _EVERYBODY,
                f"reinstall or uninstall {one.name}; until then, PYDANTIC_DISABLE_PLUGINS=1 keeps "
                "pydantic from asking",
            )  # fmt: skip
        if one.metadata_problem:
            yield _without_metadata(one, is_ours=one.name in ours)
        for entry in one.odd_values:
            yield Finding(
                "metadata", "fail" if entry.group.startswith("nshtrainer.") else "warn",
                f"{one} gives {entry.name!r} in {entry.group!r} the value {entry.value!r}",
                "`module:object` is expected; it cannot be loaded", f"upgrade or repair {one.name}",
            )  # fmt: skip


def _sentence(problem: str) -> str:
    return problem if problem.startswith(("is ", "cannot ")) else f"is malformed: {problem}"


def _without_metadata(one: Installed, *, is_ours: bool) -> Finding:
    what = (
        f"{one.path} is an empty folder" if one.is_empty else f"{one.path}: {one.metadata_problem}"
    )
    return Finding(
        "metadata", "fail" if is_ours else "warn", what,
        "such a leftover of an interrupted install can hide the good distribution of the same "
        "name, and with it its plugins",
        f"delete {one.path}, then pip install --force-reinstall {one.name}",
    )  # fmt: skip


def _ours(found: Sequence[Installed]) -> set[str]:
    """Distributions that matter here: the core, what it requires, and all that provide plugins."""
    names = {CORE, _MONOLITH}
    for one in found:
        if one.name.startswith("nshtrainer-") or any(
            e.group.startswith("nshtrainer.") for e in one.entry_points
        ):
            names.add(one.name)
        if one.name == CORE:
            names |= {parse(r)[0] for r in one.requires}
    return names


def _twice(found: Sequence[Installed]) -> Iterator[Finding]:
    ours, others = _ours(found), list[str]()
    places: dict[str, list[Installed]] = {}
    for one in found:
        if not one.metadata_problem:
            places.setdefault(one.name, []).append(one)
    for name, several in sorted(places.items()):
        if len(several) < 2:
            continue
        if name not in ours:
            others.append(name)
            continue
        in_one_folder = len({one.folder for one in several}) < len(several)
        yield Finding(
            "metadata", "fail" if in_one_folder else "warn",
            f"{name} is there {len(several)} times: "
            + ", ".join(f"{one.version} in {one.path}" for one in several),
            "which of them counts is chance" if in_one_folder
            else f"the first on sys.path counts, which is {several[0].version}",
            f"run `pip uninstall {name}` until it is gone, then install it once",
        )  # fmt: skip
    if others:
        yield Finding(
            "metadata", "warn", f"installed more than once: {', '.join(others)}",
            "the first on sys.path counts; none of these concerns nshtrainer",
            "uninstall the one that is not wanted, if that is not on purpose",
        )  # fmt: skip


def _import_package(found: Sequence[Installed]) -> Iterator[Finding]:
    monolith = by_name(found).get(_MONOLITH)
    if monolith is not None:
        yield Finding(
            "package", "fail", f"the distribution {monolith} is installed beside {CORE}",
            "both own the folder `nshtrainer` and overwrite each other's files; uninstalling one "
            "deletes files of the other",
            f"pip uninstall {_MONOLITH}, then pip install --force-reinstall {CORE}",
        )  # fmt: skip
    expected = Path(__file__).resolve().parents[2] / "nshtrainer" / "__init__.py"
    spec = find_module("nshtrainer")
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if origin == expected:
        yield Finding("package", "ok", f"`import nshtrainer` gives {expected.parent}")
    else:
        yield Finding(
            "package", "fail", f"`import nshtrainer` gives {origin or 'a folder without __init__.py'}",
            f"{CORE} is in {expected.parent}; something earlier on sys.path has the same name",
            "rename that folder or file, or run from another one",
        )  # fmt: skip
