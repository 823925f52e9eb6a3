"""The command line of the faults."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .child import Plan, end, listen
from .disk import CASES, start_case
from .kill import run_kills

OTHER = Path("/dev/shm")  # noqa: S108 -- only where it is another file system


def main(argv: list[str] | None = None) -> int:
    """Do what *argv* says; the exit code is 1 if ours broke a promise."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found, too")
    parser.add_argument("--dir", type=Path, help="work below this folder; default: the system's")
    commands = parser.add_subparsers(dest="command", required=True)
    kill = commands.add_parser("kill", help="kill trainings and count what is left")
    kill.add_argument("--kills", type=int, default=500)
    kill.add_argument("--subject", choices=("ours", "lightning"), default="ours")
    kill.add_argument("--size", type=float, default=1.0, help="of a checkpoint, in MB (1, 2, 6)")
    kill.add_argument("--async-save", action="store_true", help="ours writes in the background")
    kill.add_argument("--seed", type=int, default=0)
    kill.add_argument("--window", type=float, default=0.7, help="seconds for a random moment")
    commands.add_parser("disk", help="let the file system fail and show what comes of it")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folders are removed
    here = Path(tempfile.mkdtemp(prefix="nshtrainer-faults-", dir=options.dir))
    other = _another_file_system(here)
    try:
        if options.command == "disk":
            return _disk(options, here)
        return _kill(options, here, other)
    finally:
        shutil.rmtree(here, ignore_errors=True)
        if other is not None:
            shutil.rmtree(other, ignore_errors=True)


def _kill(options: argparse.Namespace, here: Path, other: Path | None) -> int:
    if other is None:
        print(f"no second file system at {OTHER}; its cells are left out", file=sys.stderr)
    plan = Plan(
        root=here, subject=options.subject, size=options.size, async_save=options.async_save
    )
    report = run_kills(
        plan,
        options.kills,
        seed=options.seed,
        window=options.window,
        other=other,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(report.as_table())
    if options.json is not None:
        options.json.write_text(report.as_json(), encoding="utf-8")
    return 0 if options.subject == "lightning" or report.is_clean else 1


def _disk(options: argparse.Namespace, here: Path) -> int:
    """All cases at once: mostly they wait."""
    children = {}
    for case in CASES:
        (here / case.name).mkdir()
        children[case.name] = start_case(case, here / case.name)
    results: dict[str, Any] = {}
    print("| fault | training | last, in the meantime | goes on |\n|---|---|---|---|")
    for name, child in children.items():
        result = next((t for t in listen(child) if t["event"] == "result"), None)
        end(child)
        if result is None:
            log = (here / name / "log.txt").read_text(encoding="utf-8", errors="replace")
            results[name] = {"log": log}
            print(f"| {name} | no result | | |")
            continue
        results[name] = result
        error, again = result["error"], result["again"]
        ended = f"step {result['step']}" + (f", {error[0]}" if error else "")
        went_on = f"{again['start'] and again['start']['step']} to {again['step']}"
        print(f"| {name} | {ended} | {result['last']} {result['faults'] or ''} | {went_on} |")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


def _another_file_system(here: Path) -> Path | None:
    if OTHER.is_dir() and OTHER.stat().st_dev != here.stat().st_dev:
        return Path(tempfile.mkdtemp(prefix="nshtrainer-faults-", dir=OTHER))
    return None


if __name__ == "__main__":
    sys.exit(main())
