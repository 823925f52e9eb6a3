"""What clients may do to gradients after they were measured, and what is known of a skipped step."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD
from torch.utils.data import DataLoader

from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradient_norms import largest_names, scale_in_place
from nshtrainer.runtime.gradients import GradientRequest, StepOutcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # tiny data
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 with torch 2.15
]


class Module(LightningModule):
    """Two layers, and what each step changed in them."""

    def __init__(self, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 1)
        self.fused, self.changes = fused, []

    def training_step(self, batch, batch_idx):
        self.before = [p.detach().clone() for p in self.parameters()]
        return 100 * self.second(self.first(batch).tanh()).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pairs = zip(self.before, self.parameters(), strict=True)
        flat = torch.cat([(a - b.detach()).flatten() for a, b in pairs])
        self.changes.append(flat.norm().item())

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1e-3, fused=self.fused)

    def train_dataloader(self):
        return DataLoader(torch.arange(36.0).reshape(12, 3) / 36 + 0.1, batch_size=2)


class Scaling(Callback):
    """Asks for gradients of at most a given norm, or for a skip, and keeps what it sees."""

    def __init__(self, most=math.inf, skip=(), name="client"):
        self.most, self.skip, self.name = most, skip, name
        self.clipped, self.norms, self.released, self.steps = [], [], [], []

    def setup(self, trainer, pl_module, stage):
        attach(trainer, self.name).gradients.register(
            self.name,
            request=lambda step: GradientRequest(totals=(2.0,), clipped=True),
            decide=self.decide,
            observe=self.observe,
            outcome=self.outcome,
        )

    def decide(self, step):
        coefficient = (self.most / step.norms.totals[2.0]).clamp(max=1.0)
        return StepOutcome(step.step in self.skip, "asked", coefficient)

    def observe(self, step):
        self.norms.append(step.norms.totals[2.0].item())
        self.clipped.append(step.clipped and step.clipped.totals[2.0].item())

    def outcome(self, step, skipped):
        self.steps.append(step)
        self.released.append(step.largest_parameters(2.0, 2))

    @property
    def all_released(self):
        return all(not step.released for step in self.steps)


def fit(module, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def scaled():
    """Lightning's 16-mixed with a real GradScaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    return MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaler", [False, True])
def test_gradients_are_multiplied_by_the_smallest_coefficient(scaler, fused):
    """Of several clients, once, whether they are still scaled or not; all see it."""
    module = Module(fused)
    clients = [Scaling(3.0, name="a"), Scaling(0.5, name="b"), Scaling(2.0, name="c")]
    fit(module, *clients, **({"plugins": [scaled()]} if scaler else {}))

    assert min(clients[0].norms) > 0.5
    assert module.changes == pytest.approx([0.5e-3] * 6, rel=1e-3)
    for client in clients:
        assert client.clipped == pytest.approx([0.5] * 6, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("limit", [0.2, 50.0])
def test_lightning_clips_what_clients_have_scaled(limit, algorithm):
    """The norms after clipping are those of the gradients that are applied."""
    module, client = Module(), Scaling(0.5)
    fit(module, client, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)

    applied = [change / 1e-3 for change in module.changes]
    assert client.clipped == pytest.approx(applied, rel=1e-3)
    if algorithm == "norm":
        assert client.clipped == pytest.approx([min(limit, 0.5)] * 6, rel=1e-3)


def test_a_skipped_step_can_be_explained_until_its_outcome_was_told():
    """Its largest gradients are known to the outcome phase, and let go after it."""
    client = Scaling(skip={1, 4})
    module = Module()
    fit(module, client)

    assert [change == 0 for change in module.changes] == [i in {1, 4} for i in range(6)]
    for norm, largest in zip(client.norms, client.released, strict=True):
        assert len(largest) == 2
        assert 0 < largest[1][1] <= largest[0][1] <= norm
    assert client.all_released


def test_scaling_reaches_every_kind_of_gradient():
    """Dense of several dtypes, sparse with duplicates, and none."""
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 4.0], (3,), check_invariants=True)
    grads = [torch.ones(2), torch.ones(3, dtype=torch.bfloat16), sparse, torch.ones(0)]
    scale_in_place(grads, torch.tensor(0.5))
    scale_in_place([], torch.tensor(0.5))

    assert grads[0].tolist() == [0.5, 0.5]
    assert grads[1].dtype == torch.bfloat16
    assert grads[1].tolist() == [0.5] * 3
    assert grads[2].to_dense().tolist() == [1.5, 0.0, 2.0]


def test_largest_gradients_come_in_order():
    """What is not finite first, then by norm, as unscaled."""
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([math.nan]), torch.tensor([60.0])]
    names = ["small", "bad", "large"]

    assert largest_names(names, grads, 2.0, torch.tensor(2.0), 5)[1:] == [
        ("large", 30.0),
        ("small", 2.5),
    ]
    assert largest_names(names, grads, 2.0, None, 1)[0][0] == "bad"
    assert largest_names([], [], 2.0, None, 3) == []
