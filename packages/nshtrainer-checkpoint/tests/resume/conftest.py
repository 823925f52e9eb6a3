"""Makes `runs.py` importable as `resume_runs`: workers unpickle its datasets by this name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "resume_runs" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "resume_runs", Path(__file__).with_name("runs.py")
    )
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["resume_runs"] = _module
    _spec.loader.exec_module(_module)
