"""The programs in `examples` run as they stand and reach the accuracy that they are shown for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nshtrainer import TrainerConfig
from nshtrainer.demo.config import demo_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, folder: Path) -> str:
    """Run the program in *folder* as a user would, and return what it printed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("NSHTRAINER", "PL_"))}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy_in(output: str) -> float:
    found = re.search(r"best validation accuracy: ([\d.]+)%", output)
    assert found is not None, output
    return float(found[1])


@pytest.mark.slow
def test_digits_reaches_97_percent(tmp_path):
    """`digits.py` ends above 97 %, and leaves its record and its checkpoints behind."""
    output = run_example("digits.py", tmp_path)

    (run,) = (p for p in (tmp_path / "nshtrainer_logs").iterdir() if p.is_dir())
    assert accuracy_in(output) >= 97.0
    assert (run / "checkpoint" / "best_val_acc.ckpt").is_file()
    assert (run / "checkpoint" / "last.ckpt").is_file()
    assert TrainerConfig.from_file(run / "config.yaml").early_stopping is not None


@pytest.mark.slow
def test_plain_lightning_reaches_95_percent(tmp_path):
    """`plain_lightning.py` trains with callbacks on Lightning's own trainer, timed epochs included."""
    output = run_example("plain_lightning.py", tmp_path)

    assert accuracy_in(output) >= 95.0
    assert re.search(r"last epoch: [\d.]+ s", output)
    assert len(list(tmp_path.rglob("best_val_acc.ckpt"))) == 1


def test_the_yaml_file_is_the_demo():
    """`digits.yaml` describes exactly the run of `nshtrainer demo`."""
    assert TrainerConfig.from_file(EXAMPLES / "digits.yaml") == demo_config()[0]


def test_every_example_is_listed():
    """The README of the examples names each of them."""
    readme = (EXAMPLES / "README.md").read_text()
    names = {p.name for p in EXAMPLES.iterdir() if p.suffix in {".py", ".yaml"} or p.is_dir()}

    assert {n for n in names if f"`{n}" not in readme} - {"__pycache__"} == set()
