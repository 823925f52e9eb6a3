"""A folder of fake distributions, and the program run on it as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

CALLBACK = """
from typing import Literal
from nshtrainer import CallbackConfigBase

class Config(CallbackConfigBase):
    '''A callback of a test.'''

    name: Literal["{name}"] = "{name}"

    strength: int = 1
    '''How strong it is.'''

    def create_callbacks(self, trainer_config):
        return ()
"""


RECORD = """
import atexit, sys
here = open("modules.txt", "w")
atexit.register(lambda: here.write(" ".join(sys.modules)))
from nshtrainer_cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Site:
    """A folder on `PYTHONPATH`, and a working directory of its own."""

    folder: Path
    cwd: Path

    def distribution(self, dist, entry_points="", modules=None, version="1.0", metadata=None):
        """Write a real `dist-info` folder and modules beside it, as an installer does."""
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n"
        (info / "METADATA").write_text(text if metadata is None else metadata)
        if entry_points:
            (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        for name, source in (modules or {}).items():
            path = self.folder / (name.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        return info

    def callback(self, dist, name, version="1.0"):
        """Install a distribution with one good callback."""
        module = dist.replace("-", "_")
        entry = f"[nshtrainer.callbacks]\n{name} = {module}:Config\n"
        return self.distribution(dist, entry, {module: CALLBACK.format(name=name)}, version)

    def run(self, *args, start=("-m", "nshtrainer_cli"), **environ):
        """Run `nshtrainer ARGS` in a process of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NSHTRAINER", "PYTHON"))}
        return subprocess.run(
            [sys.executable, *start, *args],
            env={**kept, "PYTHONPATH": str(self.folder), **environ},
            cwd=self.cwd, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def imported_by(self, *args, **environ):
        """The modules that the process of `nshtrainer ARGS` has loaded when it ends."""
        self.run(*args, start=("-c", RECORD), **environ)
        return set((self.cwd / "modules.txt").read_text().split())


@pytest.fixture
def site(tmp_path):
    folder, cwd = tmp_path / "site", tmp_path / "cwd"
    folder.mkdir()
    cwd.mkdir()
    return Site(folder, cwd)
