"""Importing nshtrainer, and reading a configuration, against importing Lightning.

Each sample is a fresh interpreter that times itself, so starting it does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from .every_family import every_family
from .method import Comparison, Sample, Sampler, Settings
from .registry import benchmark

_CHILD = """
import json, sys, time
config = json.loads(sys.argv[1])
cpu, start = time.process_time(), time.perf_counter()
{work}
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
loaded = sorted({{"torch", "lightning", "numpy", "wandb"}} & set(sys.modules))
print(json.dumps([wall, cpu, loaded]))
"""
_LIGHTNING = "import lightning.pytorch"
_VALIDATED = "import nshtrainer; nshtrainer.TrainerConfig.model_validate(config)"
_VALIDATION = "import nshtrainer, validate a config of every family"
_WORK = {
    _LIGHTNING: _LIGHTNING,
    "what nshtrainer depends on": "import importlib_metadata, pluggy, pydantic",
    "import nshtrainer": "import nshtrainer",
    _VALIDATION: _VALIDATED,
}
_LIMIT = 0.05


@benchmark("import", "import nshtrainer and validate a config, against importing Lightning")
def import_time(_settings: Settings) -> Iterator[Comparison]:
    """Interpreters that import one thing each, in turn."""
    yield Comparison(
        case="a fresh interpreter",
        baseline=_LIGHTNING,
        samplers={name: _child(work) for name, work in _WORK.items()},
        limits={_VALIDATION: _LIMIT},
    )


def _child(work: str) -> Sampler:
    command = [sys.executable, "-c", _CHILD.format(work=work), json.dumps(every_family())]
    # The warm-up compiles; without this every sample would, for those modules that never were.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def sample() -> Sample:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"the interpreter for `{work}` failed:\n{done.stderr}")
        wall, cpu, loaded = json.loads(done.stdout)
        if loaded and work != _LIGHTNING:
            raise RuntimeError(f"`{work}` loaded {', '.join(loaded)}, which it must not")
        return Sample(wall, cpu)

    return sample
