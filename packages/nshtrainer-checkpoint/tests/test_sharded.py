from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nshtrainer_checkpoint.metadata import SidecarReader, is_intact, sidecar_of

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

HERE = Path(__file__).parent


def train(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_", "NODE_"))}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, HERE / "sharded_training.py", root, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip


def end_of(root: Path, run_id: str, rank: int) -> dict[str, Any]:
    return torch.load(root / f"{run_id}-{rank}.pt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_sharded_checkpoints_are_committed_and_resumed_exactly(tmp_path: Path):
    """Each rank writes its shard into a directory with metadata, digest and link like any other."""
    for arguments in (("straight", 3, "auto"), ("split", 2, "auto"), ("split", 3, "auto")):
        done = train(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]

    for rank in (0, 1):
        straight, resumed = (end_of(tmp_path, run_id, rank) for run_id in ("straight", "split"))
        assert straight["step"] == resumed["step"] == 6
        assert straight["source"] == "None"
        assert "step4" in resumed["source"]
        assert same(straight["weights"], resumed["weights"])
        assert same(straight["moments"], resumed["moments"])

    folder = tmp_path / "nshtrainer_logs" / "split" / "checkpoint"
    last = (folder / "last.ckpt").resolve()
    records = SidecarReader().records(folder / "last")
    record = next(r for r in records if r.path == last)
    assert record.path.is_dir()
    assert record.step == 6
    assert is_intact(record)
    data = json.loads(sidecar_of(last).read_text())
    assert data["checkpoint_size_bytes"] == sum(f.stat().st_size for f in last.iterdir())
    assert len([f for f in last.iterdir() if f.suffix == ".distcp"]) == 2

    # One bit of one shard: refused, and the one before is taken.
    shard = next(f for f in last.iterdir() if f.suffix == ".distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused = train(tmp_path, "split", 4, last)
    assert refused.returncode != 0
    assert "is damaged" in refused.stderr
    assert train(tmp_path, "split", 4, "auto", "async").returncode == 0
    again = end_of(tmp_path, "split", 0)
    assert again["step"] == 8
    assert "step4" in again["source"]
