"""The code that the project promises to run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "callbacks.md"
NUM_BLOCKS = 9


def blocks() -> list[str]:
    """The Python blocks of the page, in order."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_promised_block_runs_in_one_namespace():
    """All blocks run in order, in one namespace that holds only `Literal`."""
    found = blocks()
    code = (
        "from typing import Literal\n"
        "namespace = {'Literal': Literal}\n"
        f"for block in {found!r}:\n"
        "    exec(block, namespace)\n"
        "config = namespace['config']\n"
        "print(type(config).__name__, config.callbacks[0].log_every_n_steps)\n"
        "import nshtrainer\n"
        "print([type(c).__name__ for c in nshtrainer.resolve_callbacks(config)][-1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert len(found) == NUM_BLOCKS
    assert done.returncode == 0, done.stderr
    assert "TrainerConfig 100" in done.stdout


def test_the_promised_blocks_run_in_a_notebook_that_runs_them_twice():
    """Each cell can be run again; the newest definition counts."""
    code = (
        "from typing import Literal\n"
        "namespace = {'Literal': Literal, '__name__': '__main__'}\n"
        f"for block in {blocks()!r}:\n"
        "    exec(block, namespace)\n"
        "    exec(block, namespace)\n"
        "config = namespace['config']\n"
        "assert type(config.callbacks[0]) is namespace['MyCallbackConfig']\n"
        "assert type(config)(**config.model_dump()) == config\n"
        "print('ok')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout.strip() == "ok", done.stderr
