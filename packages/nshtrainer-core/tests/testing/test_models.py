"""The tiny module and data are deterministic, silent, and work in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from nshtrainer.testing import HostSyncs, TinyDataModule, TinyLoader, TinyModule, differences, facts
from nshtrainer.testing import quiet_trainer_kwargs as quiet
from nshtrainer.testing.traces import same


# Lightning's call of a torch function that torch 2.10 deprecates; nothing of ours is involved.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_norm": True},
        {"manual": True},
        {"optimizers": 2},
        {"optimizer": "sgd", "lr": 0.1},
        {"fused": True},
    ],
)
def test_every_variant_learns_the_same_in_every_run(options: dict[str, Any], tmp_path):
    """Two runs are bitwise equal, lower the loss, and warn of nothing."""
    weights, losses = [], []
    for _ in "12":
        module, trainer = TinyModule(**options), Trainer(**quiet(tmp_path, max_epochs=4))
        before = module.loss(next(iter(TinyLoader()))).item()
        trainer.fit(module, datamodule=TinyDataModule())
        weights.append(module.state_dict())
        losses.append((before, module.loss(next(iter(TinyLoader()))).item()))
        assert {"train_loss", "val_loss"} <= trainer.callback_metrics.keys()

    assert same(*weights)
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]


def test_models_and_data_leave_the_global_generator_alone():
    """Neither making them nor iterating moves torch's random state; seeds tell them apart."""
    state = torch.get_rng_state()
    one, other = TinyModule(seed=1), TinyModule(seed=2)
    batches = list(TinyLoader(batches=3, batch_size=5))

    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.body.weight, other.body.weight)
    assert [(x.shape, y.shape) for x, y in batches] == [((5, 4), (5, 1))] * 3
    assert len(TinyLoader(batches=3)) == 3


READS = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "bool": lambda t: bool(t.sum()),
    "format": lambda t: f"{t.sum():.2f}",
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to_text": lambda t: t.to("cpu"),
    "to_device_text": lambda t: t.to(device="cpu"),
    "numpy": lambda t: t.numpy(),
    "equal": lambda t: torch.equal(t, t),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "unique": lambda t: t.unique(),
    "contains": lambda t: 1.0 in t,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_host_syncs_are_counted_in_every_spelling(read):
    """Whatever makes the host wait for the device is counted, while a section is open."""
    tensor = torch.ones(3)
    with HostSyncs() as syncs:
        read(tensor)
        syncs.section = "here"
        read(tensor)
        syncs.section = None
        read(tensor)

    assert list(syncs.counts) == ["here"]
    assert sum(syncs.counts["here"].values()) >= 1


def test_work_on_the_device_is_no_host_sync():
    """Arithmetic, norms, copies and selections of fixed size are not counted."""
    tensor = torch.ones(3)
    with HostSyncs() as syncs:
        syncs.section = 0
        torch.where(tensor > 0, tensor, 0 * tensor).add_(1)
        torch._foreach_norm([tensor, tensor])  # the call that norm logging makes
        tensor.to(tensor.device)
        tensor.clone().copy_(tensor)[1:].to(torch.float64).lerp_(tensor[:2].double(), 0.5)
        tensor[torch.tensor([0, 1])].detach().isfinite().all()

    assert syncs.counts == {}


def test_facts_name_what_changed():
    """The difference of two looks at a module says where and what."""
    module = nn.Sequential(nn.Linear(2, 2))
    before = facts(module)
    module[0].register_forward_hook(lambda *_: None)
    module[0].weight.requires_grad_(False)
    module.eval()

    found = differences(facts(module), before)

    assert "0._forward_hooks: 1 instead of 0" in found
    assert "0.weight.requires_grad: False instead of True" in found
    assert "module.training: False instead of True" in found


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (float("nan"), float("nan"), True),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor(1.0), torch.tensor(1.0).double(), False),
        (torch.tensor(1.0), 1.0, False),
        ({"a": [1, (2, None)]}, {"a": [1, (2, None)]}, True),
        ({"a": 1}, {"b": 1}, False),
        ([1, 2], (1, 2), False),
        (1, True, False),
    ],
)
def test_same_is_bitwise_and_nested(one, other, equal):
    """Resumed state is compared to the last bit and with its types."""
    assert same(one, other) is equal
    assert same({"x": [one]}, {"x": [other]}) is equal
