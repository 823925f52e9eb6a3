"""What a run is apart from its training: its id, its directory, the surroundings it ran in.

Nothing here imports torch or Lightning.
"""

from __future__ import annotations

from nshtrainer.run.directory import RunDirectory
from nshtrainer.run.environment import EnvironmentSnapshot
from nshtrainer.run.identity import (
    RUN_ID_VARIABLE,
    known_run_id,
    new_run_id,
    run_id_in_environment,
    validate_run_id,
)
from nshtrainer.run.redaction import redact

__all__ = [
    "RUN_ID_VARIABLE",
    "EnvironmentSnapshot",
    "RunDirectory",
    "known_run_id",
    "new_run_id",
    "redact",
    "run_id_in_environment",
    "validate_run_id",
]
