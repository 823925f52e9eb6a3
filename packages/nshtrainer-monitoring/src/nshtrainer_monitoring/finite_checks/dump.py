"""The file about a finding: its batches, the names, and the random states.

Read by `torch.load(path, weights_only=True)`:

    {
        "version": 1,
        "step": 120,            # optimizer step, from 0
        "rank": 0,
        "findings": [{"what": "gradients", "names": ["layer.weight"]}],
        "module": "layer",      # None if it was not looked for, or not found
        "origin": "Run again, ...",
        "batches": [{"batch_idx": 120, "batch": ..., "random": {...}}],
    }
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nshtrainer.files import atomic_write

from .batches import MicroBatch, plain

if TYPE_CHECKING:
    from .acting import Finding
    from .rerun import Origin

__all__ = ["write_dump"]

_VERSION = 1


def write_dump(
    folder: Path,
    label: str | None,
    *,
    step: int,
    rank: int,
    findings: Sequence[Finding],
    origin: Origin | None,
    batches: Sequence[MicroBatch],
) -> Path:
    """Write a file in *folder*, whole or not at all, and return it; the folder is made if missing.

    Raises:
        OSError: The file cannot be written.
    """
    content: dict[str, Any] = {
        "version": _VERSION,
        "step": step,
        "rank": rank,
        "findings": [{"what": f.what, "names": list(f.names)} for f in findings],
        "module": None if origin is None else origin.module,
        "origin": None if origin is None else origin.text,
        "batches": [
            {"batch_idx": b.batch_idx, "batch": plain(b.batch), "random": b.random.plain()}
            for b in batches
        ],
    }
    suffix = f"-{label}" if label else ""
    path = folder / f"step{step:010d}-rank{rank}{suffix}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(content, file)
    return path
