"""`nshtrainer plugins`: what is installed, and in which state it is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import click

from nshtrainer.callbacks.base import callback_registry
from nshtrainer.loggers.base import logger_registry
from nshtrainer.plugins.catalogue import CORE, FAMILIES, install_command
from nshtrainer.plugins.hooks import plugin_manager
from nshtrainer.plugins.manifest import CALLBACKS, HOOKS, LOGGERS, Entry, manifest
from nshtrainer.plugins.policy import ALLOW, DISABLE, PREFER, STRICT
from nshtrainer.plugins.state import PluginState

from .output import plugins_print_to_stderr

__all__ = ["Row", "plugins"]

_KINDS = {CALLBACKS: "callback", LOGGERS: "logger", HOOKS: "hooks"}
_REGISTRIES = {CALLBACKS: callback_registry, LOGGERS: logger_registry}
_FAULTY = {"broken", "clash", "incompatible"}


@dataclass(frozen=True)
class Row:
    """One entry of the manifest, as it is shown."""

    distribution: str
    version: str
    kind: str
    name: str
    value: str
    path: str
    editable: bool
    state: str
    what: str
    remedy: str
    hooks: list[str] = field(default_factory=list)
    """The hooks that a loaded hook module implements."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option(
    "--load",
    is_flag=True,
    help="Import every plugin to see its real state; exit status 1 if one cannot be used.",
)
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, load: bool) -> None:
    """List what is installed, and in which state it is.

    Nothing is imported, unless --load is given: until then a plugin that can be found is `available`,
    whether it works or not. Other states are `loaded`, `disabled` (by a switch), `clash` (two
    distributions provide one name), `unavailable` (of no use here, says the plugin), `incompatible` (it
    needs another nshtrainer-core) and `broken`; those that keep a plugin from use say what to do.
    """
    if load:
        with _not_strict(), plugins_print_to_stderr():
            _load_everything()
    rows = [_row(entry) for entry in manifest()]
    if as_json:
        click.echo(json.dumps(_report(rows), indent=2))
    else:
        click.echo("\n".join(_text(rows)))
    if load and any(row.state in _FAULTY for row in rows):
        ctx.exit(1)


@contextlib.contextmanager
def _not_strict() -> Generator[None]:
    """Strict mode stops at the first broken plugin; here all are to be seen."""
    strict = os.environ.pop(STRICT, None)
    try:
        yield
    finally:
        if strict is not None:
            os.environ[STRICT] = strict


def _load_everything() -> None:
    for registry in _REGISTRIES.values():
        registry.load_all()
    list(plugin_manager.each("nshtrainer_cli"))  # hook modules are loaded at the first hook call


def _state(entry: Entry) -> PluginState:
    registry = _REGISTRIES.get(entry.group)
    return plugin_manager.state(entry) if registry is None else registry.state(entry)


def _row(entry: Entry) -> Row:
    state = _state(entry)
    folder = _editable_folder(entry)
    return Row(
        distribution=entry.dist,
        version=entry.version,
        kind=_KINDS[entry.group],
        name=entry.name,
        value=entry.value,
        path=folder or entry.path,
        editable=folder is not None,
        state=state.kind,
        what=state.what,
        remedy=state.remedy,
        hooks=plugin_manager.implementations(entry) if entry.group == HOOKS else [],
    )


def _editable_folder(entry: Entry) -> str | None:
    """Where an editable install has its sources, None for an ordinary install."""
    try:
        text = cast("Any", entry.distribution).read_text("direct_url.json")
        direct: Any = json.loads(text or "{}")
        is_editable = bool(direct.get("dir_info", {}).get("editable"))
        return unquote(urlsplit(str(direct["url"])).path) if is_editable else None
    except Exception:  # noqa: BLE001 -- a courtesy; broken metadata must not break the list
        return None


def _missing() -> list[str]:
    """First-party families that are not installed."""
    have = {entry.dist for entry in manifest()}
    return [family for family in FAMILIES if family not in have]


def _switches() -> dict[str, str]:
    return {v: os.environ[v] for v in (ALLOW, DISABLE, PREFER, STRICT) if v in os.environ}


def _report(rows: Iterable[Row]) -> dict[str, Any]:
    return {
        "plugins": [asdict(row) for row in rows],
        "problems": [{"distribution": d, "error": e} for d, e in manifest().problems],
        "missing": [{"distribution": d, "install": install_command(d)} for d in _missing()],
        "switches": _switches(),
    }


def _text(rows: list[Row]) -> Iterator[str]:
    dists = sorted({row.distribution for row in rows}, key=lambda d: (d != CORE, d))
    for dist in dists:
        mine = [row for row in rows if row.distribution == dist]
        where = f"{mine[0].path}{' (editable)' if mine[0].editable else ''}"
        yield f"{dist} {mine[0].version}  {where}"
        width = max(len(row.name) for row in mine)
        for row in mine:
            yield f"  {row.kind:<8}  {row.name:<{width}}  {row.state:<9}  {row.value}".rstrip()
            if row.hooks:
                yield f"            implements {', '.join(row.hooks)}"
            if row.what:
                yield f"            {row.what}"
            if row.remedy:
                yield f"            {row.remedy}"
        yield ""
    for variable, value in _switches().items():
        yield f"switch: {variable}={value}"
    for dist, error in manifest().problems:
        yield f"unreadable: {dist}: {error}; `nshtrainer doctor` says more"
    for dist in _missing():
        yield f"not installed: {dist}; {install_command(dist)}"
    clear = sum(row.state not in _FAULTY for row in rows)
    unseen = sum(row.state == "available" for row in rows)
    hint = f", {unseen} not loaded yet: --load tells whether they work" if unseen else ""
    faulty = len(rows) - clear
    yield f"{len(rows)} plugins of {len(dists)} distributions, {faulty} of them with a fault{hint}."
