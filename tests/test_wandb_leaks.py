"""What many fits with W&B leave behind in a process; `python -m benchmarks.wandb_leaks` does a hundred."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks import wandb_leaks
else:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        wandb_leaks = importlib.import_module("benchmarks.wandb_leaks")
    finally:
        sys.path.pop(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(("method", "fits"), [("optimizer_step", 5), ("hooks", 2)])
def test_fits_with_wandb_leave_nothing_behind(
    method, fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No threads, open files, processes, trainers or hooks come with each further fit."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    for name in ("SILENT", "X_DISABLE_STATS"):
        monkeypatch.setenv(f"WANDB_{name}", "true")
    monkeypatch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")

    assert wandb_leaks.growth_over_fits(tmp_path, fits, method) == {}


def test_what_becomes_more_is_named():
    """The count is able to fail: a thread and a hook that stay are told."""
    import threading

    from nshtrainer.testing import TinyModule

    module, done = TinyModule(), threading.Event()
    before = wandb_leaks.Held.now(module)
    thread = threading.Thread(target=done.wait, name="stays")
    thread.start()
    module.head.weight.register_hook(lambda grad: grad)
    try:
        growth = wandb_leaks.Held.now(module).growth(before)
    finally:
        done.set()
        thread.join()

    assert growth == {"threads: stays": 1, "hooks: of a parameter": 1}
