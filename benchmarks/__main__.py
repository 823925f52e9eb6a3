"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .machine import machine_facts, one_thread
from .method import Settings
from .registry import all_benchmarks
from .rows import Row, as_json, as_table


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks that *argv* names (all, without a name); the table goes to stdout."""
    one_thread()
    benchmarks = all_benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ratios against peers, measured side by side.",
        epilog="\n".join(f"{b.name:<14}{b.about}" for b in benchmarks.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; all by default")
    parser.add_argument("--quick", action="store_true", help="few, small rounds: no verdict")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in benchmarks]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]!r}; there are {', '.join(benchmarks)}")
    settings = Settings.quick() if options.quick else Settings()
    machine = machine_facts()
    rows: list[Row] = []
    for name in options.names or benchmarks:
        print(f"{name}: {benchmarks[name].about}", file=sys.stderr, flush=True)
        rows += benchmarks[name].run(settings)
    print(as_table(rows))
    if settings.is_quick:
        print("\nquick: few and small rounds, to see that the benchmarks run; this is no verdict")
    if options.json is not None:
        options.json.write_text(as_json(rows, machine, settings), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
