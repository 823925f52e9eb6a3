"""`nshtrainer doctor`: what is the matter with this environment, why, and what to do about it.

Only the standard library is used, and installed packages are read, not imported: what is broken
cannot break the examination. What has to be imported to be judged is imported in a child process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .finding import Finding, worst
from .importing import check_config_time, check_import
from .installed import Installed, installed
from .metadata import check_metadata
from .plugins import check_plugins
from .surroundings import check_log_folder, check_switches
from .versions import CORE, check_versions

__all__ = ["Finding", "examine", "main"]


def examine(*, deep: bool = False) -> list[Finding]:
    """Examine the environment of this interpreter.

    Args:
        deep: Also import every plugin's config modules, each distribution in its own process, to
            see what they cost and whether they load torch.
    """
    return list(_examine(installed(sys.path), deep=deep))


def _examine(found: Sequence[Installed], *, deep: bool) -> Iterator[Finding]:
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": lambda: check_versions(found),
        "metadata": lambda: check_metadata(found),
        "plugins": lambda: check_plugins(found, os.environ),
        "switches": lambda: check_switches(found, os.environ),
        "log folder": check_log_folder,
        "import": check_import,
    }
    if deep:
        checks["config time"] = lambda: check_config_time(found)
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 -- a look that fails must not end the examination
            yield Finding(
                name, "warn", f"this could not be looked at: {type(error).__name__}: {error}",
                "doctor met something that it does not know", "report it with what is shown here",
            )  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Run `nshtrainer doctor`; returns 1 if anything failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="nshtrainer doctor",
        description="Examine this environment: versions, package metadata, plugins, switches. "
        "Runs even where nshtrainer itself cannot be imported. Exit status 1 if something failed.",
        add_help=False,  # argparse's own is silent where stdout takes nothing
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this message and exit")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument(
        "--deep", action="store_true", help="also import every plugin's config, to find slow ones"
    )
    options = parser.parse_args(args)
    if options.help:
        sys.stdout.write(parser.format_help())
        return 0
    findings = examine(deep=options.deep)
    status = worst(findings)
    text = _as_json(findings, status) if options.json else _as_text(findings)
    sys.stdout.write(text + "\n")
    return 1 if status == "fail" else 0


def _as_json(findings: Sequence[Finding], status: str) -> str:
    report: dict[str, Any] = {
        "status": status,
        "python": platform.python_version(),
        "executable": sys.executable,
        "findings": [finding.as_dict() for finding in findings],
    }
    return json.dumps(report, indent=2)


def _as_text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.check) for finding in findings)
    lines: list[str] = []
    for finding in sorted(findings, key=lambda f: ("fail", "warn", "ok").index(f.status)):
        mark = finding.status.upper() if finding.status != "ok" else "ok"
        lines.append(f"{mark:<4}  {finding.check:<{width}}  {finding.what}")
        if finding.why:
            lines.append(f"      why: {finding.why}")
        if finding.do:
            lines.append(f"      do:  {finding.do}")
    failed, warned = (sum(f.status == s for f in findings) for s in ("fail", "warn"))
    lines.append("")
    lines.append(
        f"{CORE}: {failed} failed, {warned} to look at, {len(findings) - failed - warned} in order."
    )
    return "\n".join(lines)
