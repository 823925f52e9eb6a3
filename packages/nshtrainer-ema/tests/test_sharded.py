"""The average of sharded weights (FSDP2) on two gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).parent / "sharded_training.py"


def end_of(root: Path, name: str, rank: int) -> dict[str, Any]:
    return torch.load(root / f"{name}-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, run_on_two_ranks: Any
) -> list[dict[str, Any]]:
    """What each rank has after three epochs without interruption."""
    root = tmp_path_factory.mktemp("straight")
    run_on_two_ranks(SCRIPT, root, "straight", 3, "shards")
    return [end_of(root, "straight", rank) for rank in (0, 1)]


def test_each_rank_averages_its_own_shard(straight: list[dict[str, Any]]):
    """As one process averages the whole."""
    for rank, end in enumerate(straight):
        torch.manual_seed(0)
        average = torch.nn.Linear(8, 16).weight.detach().chunk(2)[rank].double()
        for weights in end["trained"]:
            average = 0.8 * average + 0.2 * weights.double()
        shard = end["averages"]["average"]["first.weight"]
        torch.testing.assert_close(shard.double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["shards", "whole"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    kind: str, straight: list[dict[str, Any]], run_on_two_ranks: Any, tmp_path: Path
):
    """From a checkpoint of shards and from one whole file; further averages too."""
    run_on_two_ranks(SCRIPT, tmp_path, "split", 2, kind)
    run_on_two_ranks(SCRIPT, tmp_path, "again", 3, kind, tmp_path / "split" / "epoch=1.ckpt")

    for rank, whole in enumerate(straight):
        again = end_of(tmp_path, "again", rank)
        for name, tensor in whole["weights"].items():
            assert torch.equal(again["weights"][name], tensor)
        for label, tensors in whole["averages"].items():
            for name, tensor in tensors.items():
                assert torch.equal(again["averages"][label][name], tensor), (label, name)
        assert again["metrics"] == whole["metrics"][-len(again["metrics"]) :]
