"""The command line: `nshtrainer COMMAND`.

A command's module is imported when the command is run, and none of them needs torch to start. The
program enters through `nshtrainer_cli`, which runs `doctor` without importing this package.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
