"""Run basedpyright, and fail if it checked nothing (a wrong `include` exits with 0)."""

from __future__ import annotations

import json
import subprocess
import sys

MINIMUM_FILES = 50


def main() -> int:
    """Run the checker; the exit code is its own, or 1 if too few files were seen."""
    done = subprocess.run(
        ["basedpyright", "--outputjson"], capture_output=True, text=True, check=False
    )
    report = json.loads(done.stdout)
    for found in report["generalDiagnostics"]:
        start = found["range"]["start"]
        print(
            f"{found['file']}:{start['line'] + 1}: {found['severity']}: {found['message']} ({found.get('rule', '')})"
        )
    summary = report["summary"]
    print(
        f"{summary['filesAnalyzed']} files, {summary['errorCount']} errors, {summary['warningCount']} warnings"
    )
    if summary["filesAnalyzed"] < MINIMUM_FILES:
        print(f"fewer than {MINIMUM_FILES} files were checked; is `include` right?")
        return 1
    return 1 if summary["errorCount"] or summary["warningCount"] else 0


if __name__ == "__main__":
    sys.exit(main())
