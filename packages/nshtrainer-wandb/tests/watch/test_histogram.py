from __future__ import annotations

import numpy as np
import pytest
import torch

from nshtrainer_wandb.watch import histogram
from nshtrainer_wandb.watch.histogram import count_histograms


@pytest.fixture(params=[1 << 17, 7], ids=["one pool", "pools smaller than tensors"])
def pool(request, monkeypatch):
    """Tensors are pieces of one pool, or are cut into many."""
    monkeypatch.setattr(histogram, "_POOL_ON_CPU", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_counts_are_those_of_numpy(pool, dtype):
    """Bins between the extremes of each tensor, whatever lies beside it; edges span the elements."""
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(20, 30).to(dtype),
        "shifted": (torch.randn(50) * 1e-3 + 1).to(dtype),
        "transposed": torch.randn(8, 5).to(dtype).t(),
    }

    found = count_histograms(tensors, bins=16)

    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        values = tensor.float().numpy().astype(np.float64)
        counts, _ = np.histogram(values, 16)
        # An element on an edge may be counted on either side of it.
        assert np.abs(np.cumsum(found[name].counts) - np.cumsum(counts)).max() <= 1
        assert sum(found[name].counts) == values.size
        assert found[name].edges == pytest.approx(np.linspace(values.min(), values.max(), 17))


def test_only_finite_elements_count(pool):
    """NaN and Inf are in no bin; equal elements are one bin; what has no finite element is left out."""
    tensors = {
        "mixed": torch.tensor([0.0, float("nan"), 1.0, 2.0, float("inf"), -float("inf")]),
        "nothing": torch.tensor([float("nan")] * 9),
        "equal": torch.full((9,), 5.0),
        "empty": torch.zeros(0),
        "one": torch.tensor(3.0),
    }

    found = count_histograms(tensors, bins=2)

    assert {name: tuple(value) for name, value in found.items()} == {
        "mixed": ([1.0, 2.0], [0.0, 1.0, 2.0]),
        "equal": ([9.0], [5.0, 5.0]),
        "one": ([1.0], [3.0, 3.0]),
    }


def test_unusual_tensors_are_counted():
    """Sparse ones with their zeros, complex ones by both parts, and a range beyond that of fp32."""
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (4,), check_invariants=True
    )
    tensors = {
        "sparse": sparse,
        "complex": torch.tensor([1 + 2j]),
        "huge": torch.tensor([-3e38, 3e38]),
    }

    found = count_histograms(tensors, bins=2)

    assert found["sparse"] == ([3.0, 1.0], [0.0, 2.5, 5.0])
    assert found["complex"] == ([1.0, 1.0], [1.0, 1.5, 2.0])
    assert sum(found["huge"].counts) == 2


def test_many_tensors_take_one_transfer():
    """The host is asked for one tensor, however many there are."""
    transfers: list[tuple[int, ...]] = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in ("cpu", "item", "__bool__", "__float__", "__int__"):
                transfers.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with Watching():
        found = count_histograms({str(i): torch.randn(3, 3) for i in range(50)}, bins=4)

    assert transfers == [(50, 6)]
    assert len(found) == 50


def test_deterministic_runs_can_be_watched():
    """Nothing is used that torch refuses in deterministic mode, and counts do not vary."""
    tensors = {"a": torch.randn(1000)}
    torch.use_deterministic_algorithms(True)
    try:
        first, second = count_histograms(tensors), count_histograms(tensors)
    finally:
        torch.use_deterministic_algorithms(False)

    assert first == second
