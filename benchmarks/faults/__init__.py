"""Faults on purpose, and what they leave: `python -m benchmarks.faults kill` or `disk`.

`kill` trains, kills the process at random moments and at every file event of a save, and counts what
a reader then finds. `disk` has the file system fail under a training. `child` is that training,
`check` looks at what is left without asking the code under test.
"""

from __future__ import annotations
