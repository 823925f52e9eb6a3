"""Entry points of our groups: names, clashes, and whether what they name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from .finding import Finding
from .installed import EntryPoint, Installed, by_name, normalized
from .modules import defines, find_module
from .versions import CORE

__all__ = ["GROUPS", "check_plugins", "plugins_of", "split"]

GROUPS = ("nshtrainer.callbacks", "nshtrainer.loggers", "nshtrainer.plugins")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def plugins_of(found: Sequence[Installed]) -> list[tuple[Installed, EntryPoint]]:
    """Every readable entry point of our groups, with the distribution that counts for its name."""
    return [
        (one, entry)
        for one in by_name(found).values()
        for entry in one.entry_points
        if entry.group in GROUPS
    ]


def split(value: str) -> list[str]:
    """The parts of a switch in the environment."""
    return [part.strip() for part in value.split(",") if part.strip()]


def check_plugins(found: Sequence[Installed], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Does every plugin have a usable name of its own, and is its module there?"""
    plugins = plugins_of(found)
    problems = [*_clashes(plugins, environ)]
    for one, entry in plugins:
        problems += _names(one, entry)
        problems += _targets(one, entry)
    yield from problems
    if not any(p.status == "fail" for p in problems):
        dists = len({one.name for one, _ in plugins})
        yield Finding(
            "plugins", "ok", f"{len(plugins)} entries of {dists} distributions can be found"
        )
    misspelt = [
        (one, group)
        for one in by_name(found).values()
        for group in sorted({e.group for e in one.entry_points})
        if group.startswith("nshtrainer.") and group not in GROUPS
    ]
    for one, group in misspelt:
        yield Finding(
            "plugins", "warn", f"{one} provides the entry-point group {group!r}",
            f"nobody reads it; the groups are {', '.join(GROUPS)}", f"correct or upgrade {one.name}",
        )  # fmt: skip


def _clashes(
    plugins: Sequence[tuple[Installed, EntryPoint]], environ: Mapping[str, str]
) -> Iterator[Finding]:
    providers: dict[tuple[str, str], list[Installed]] = {}
    for one, entry in plugins:
        if entry.group != "nshtrainer.plugins" and not _is_off(one, entry, environ):
            providers.setdefault((entry.group, entry.name), []).append(one)
    pairs = (p.partition("=") for p in split(environ.get("NSHTRAINER_PREFER", "")))
    preferred = {normalized(name): normalized(dist) for name, _, dist in pairs}
    for (group, name), ones in sorted(providers.items(), key=lambda item: item[0]):
        dists = sorted(one.name for one in ones)
        if len(dists) < 2 or preferred.get(normalized(name)) in dists:
            continue
        yield Finding(
            "names", "fail", f"{name!r} in {group} is provided by {' and by '.join(dists)}",
            "neither wins: a config that uses the name is refused",
            f"uninstall one, or choose with NSHTRAINER_PREFER={name}={dists[0]}",
        )  # fmt: skip


def _is_off(one: Installed, entry: EntryPoint, environ: Mapping[str, str]) -> bool:
    """Whether the environment's switches keep *entry* from use, as nshtrainer reads them."""
    if one.name == CORE:
        return False
    names = {one.name, normalized(entry.name)}
    off = {normalized(n) for n in split(environ.get("NSHTRAINER_DISABLE_PLUGINS", ""))}
    only = environ.get("NSHTRAINER_PLUGINS")
    is_denied = "*" in off or bool(names & off)
    return is_denied or (only is not None and not names & {normalized(n) for n in split(only)})


def _names(one: Installed, entry: EntryPoint) -> Iterator[Finding]:
    if _NAME.fullmatch(entry.name) is None and entry.group != "nshtrainer.plugins":
        yield Finding(
            "names", "fail", f"{one} provides {entry.name!r} in {entry.group}",
            "a name in a config starts with a-z and is made of a-z, 0-9 and _",
            f"rename the entry point in {one.name}",
        )  # fmt: skip


def _targets(one: Installed, entry: EntryPoint) -> Iterator[Finding]:
    if entry in one.odd_values:
        return  # the metadata check has said so
    remedy = f"reinstall {one.name}"
    if one.is_editable:
        remedy += " (an editable install keeps the entry points of the day it was installed)"
    spec = find_module(entry.module)
    if spec is None:
        yield Finding(
            "plugins", "fail",
            f"{entry.name!r} of {one} names the module {entry.module!r}, which is not to be found",
            "a config that uses the name is refused", remedy,
        )  # fmt: skip
    elif entry.attribute and not defines(spec, entry.attribute):
        yield Finding(
            "plugins", "fail",
            f"{entry.name!r} of {one} names {entry.value!r}, but {spec.origin} has no "
            f"{entry.attribute!r}",
            "a config that uses the name is refused", remedy,
        )  # fmt: skip
