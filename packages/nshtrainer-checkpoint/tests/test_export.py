"""Which weights an export holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nshtrainer.runtime.saving import AVERAGE_KEY
from nshtrainer_checkpoint.export import export


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_tied_weights_have_one_value_under_all_their_names(tmp_path: Path, weights: str):
    """The other set of weights is stored under the first name alone; all names get it."""
    held, other, single = torch.ones(3), torch.zeros(3), torch.full((3,), 2.0)
    record = {
        "version": 1,
        "state_dict": "average" if weights == "raw" else "weights",
        "weights": {"a": other} if weights == "raw" else {},
        "average": {"a": other} if weights == "ema" else {},
    }
    state = {"a": held, "b": held, "c": single}
    torch.save({"state_dict": state, AVERAGE_KEY: record}, tmp_path / "c.ckpt")

    export(tmp_path / "c.ckpt", tmp_path / "out.pt", weights=weights)

    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(out["a"], other)
    assert torch.equal(out["b"], other)
    assert torch.equal(out["c"], single)
