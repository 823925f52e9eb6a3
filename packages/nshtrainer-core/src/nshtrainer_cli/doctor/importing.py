"""What only an import shows, each in a child process: does it work, and what does it drag in?"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .finding import Finding
from .installed import Installed
from .plugins import plugins_of
from .versions import CORE

__all__ = ["ImportLine", "check_config_time", "check_import", "importers", "parse_import_times"]

HEAVY = ("torch", "lightning", "pytorch_lightning", "numpy", "wandb")
_TIMEOUT_S = 180
_MARK = "loaded:"
_SLOW_S = 1.0
_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|(\s+)(\S+)\s*")


@dataclass(frozen=True)
class ImportLine:
    """One line of `python -X importtime`; a module stands below what it imported."""

    module: str
    depth: int
    total_us: int


def check_import() -> Iterator[Finding]:
    """Can nshtrainer itself be imported?"""
    problem, _, _ = _run(["nshtrainer"])
    if problem:
        yield Finding(
            "import", "fail", f"`import nshtrainer` fails: {problem}",
            "the failures of `metadata`, `package` and `versions` are the usual reasons",
            "correct those first, then run `nshtrainer doctor` again",
        )  # fmt: skip
    else:
        yield Finding("import", "ok", "`import nshtrainer` works")


def check_config_time(found: Sequence[Installed]) -> Iterator[Finding]:
    """Does a distribution's config load torch, or take long?"""
    modules: dict[str, tuple[Installed, list[str]]] = {}
    for one, entry in plugins_of(found):
        modules.setdefault(one.name, (one, []))[1].append(entry.module)
    for one, names in modules.values():
        yield _config_time(one, sorted(set(names)))


def _config_time(one: Installed, modules: list[str]) -> Finding:
    problem, loaded, output = _run(["nshtrainer", *modules])
    if problem:
        return Finding(
            "config time", "fail", f"{one} cannot be imported: {problem}",
            "a config that uses one of its names is refused", f"repair or uninstall {one.name}",
        )  # fmt: skip
    lines = parse_import_times(output)
    tops = {name.partition(".")[0] for name in modules}
    took = (
        sum(x.total_us for x in lines if x.depth == 0 and x.module.partition(".")[0] in tops) / 1e6
    )
    for heavy in HEAVY:
        if heavy not in loaded:
            continue
        chain = importers(lines, heavy) or []
        if "nshtrainer" in chain and one.name != CORE:
            continue  # told once, for the core
        by = next((m for m in chain if m.partition(".")[0] in tops), one.name)
        return Finding(
            "config time", "warn", f"{by} ({one}) imports {heavy} at config time ({took:.1f} s)",
            "validating a config, `nshtrainer schema` and editors become that slow",
            f"import {heavy} inside `create_callbacks`, or in the module of the callback alone",
        )  # fmt: skip
    if took > _SLOW_S:
        return Finding(
            "config time", "warn", f"the config modules of {one} take {took:.1f} s to import",
            "validating a config becomes that slow",
            f"see `python -X importtime -c 'import {', '.join(modules)}'`",
        )  # fmt: skip
    return Finding(
        "config time", "ok", f"{one}: {took * 1e3:.0f} ms, without {' or '.join(HEAVY[:2])}"
    )


def parse_import_times(text: str) -> list[ImportLine]:
    """The modules in what `python -X importtime` wrote, in its order: imported before importer."""
    matches = (_LINE.fullmatch(line) for line in text.splitlines())
    return [ImportLine(m[4], (len(m[3]) - 1) // 2, int(m[2])) for m in matches if m is not None]


def importers(lines: Sequence[ImportLine], module: str) -> list[str] | None:
    """Who imported *module*, nearest first; None if nobody did."""
    index = next((i for i, line in enumerate(lines) if line.module == module), None)
    if index is None:
        return None
    depth, chain = lines[index].depth, list[str]()
    for line in lines[index + 1 :]:
        if line.depth < depth:
            chain.append(line.module)
            depth = line.depth
        if depth == 0:
            break
    return chain


def _run(modules: Sequence[str]) -> tuple[str, list[str], str]:
    """Import *modules* in a child: what went wrong (or ""), what of HEAVY it loaded, import times."""
    code = (
        "; ".join(f"import {name}" for name in modules)
        + f"; import sys; print({_MARK!r}, *(m for m in {HEAVY!r} if m in sys.modules))"
    )
    try:
        done = subprocess.run(  # noqa: S603 -- our own interpreter
            [sys.executable, "-X", "importtime", "-c", code],
            capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it did not end within {_TIMEOUT_S} s", [], ""
    except OSError as error:
        return f"the interpreter cannot be started: {error}", [], ""
    last = (done.stdout.splitlines() or [""])[-1].split()
    if done.returncode == 0 and last[:1] == [_MARK]:
        return "", last[1:], done.stderr
    said = [x for x in done.stderr.splitlines() if x.strip() and not x.startswith("import time:")]
    return said[-1].strip() if said else f"exit status {done.returncode}", [], done.stderr
