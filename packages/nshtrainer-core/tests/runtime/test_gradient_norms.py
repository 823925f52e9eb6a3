from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import AdamW
from torch.utils.data import DataLoader

from nshtrainer.errors import ConfigError
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradient_norms import TensorGroup, measure_groups, measure_norms
from nshtrainer.runtime.gradients import GradientRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # tiny data
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 with torch 2.15
]

ALL = GradientRequest(totals=(1.0, 2.0, math.inf), per_parameter=(2.0,), finite=True)


class Module(LightningModule):
    """Two layers."""

    def __init__(self, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 1)
        self.fused = fused

    def training_step(self, batch, batch_idx):
        return self.second(self.first(batch).tanh()).square().mean()

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.1, fused=self.fused)

    def train_dataloader(self):
        return DataLoader(torch.arange(36.0).reshape(12, 3) / 36 + 0.1, batch_size=2)


class Client(Callback):
    """Asks for norms, and keeps the last step and the gradients that were applied in it."""

    def __init__(self, request=ALL):
        self.request = request
        self.attempt = -1

    def setup(self, trainer, pl_module, stage):
        attach(trainer, "client").gradients.register(
            "client",
            transform=self.transform,
            request=lambda step: self.request,
            decide=self.decide,
            observe=self.observe,
        )

    def transform(self, step):
        self.attempt += 1

    def decide(self, step):
        return None

    def observe(self, step):
        self.step = step
        self.grads = [None if g is None else g.clone() for g in step.grads]


def fit(module, *callbacks, **options):
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=list(callbacks),
        **options,
    ).fit(module)


def scaled():
    """Lightning's 16-mixed with a real GradScaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)


PRECISIONS = {
    "32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "16 scaled": lambda: {"plugins": [scaled()]},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_norms_are_those_of_the_unscaled_gradients(fused, precision):
    """Totals, per-parameter norms and finiteness agree with a float64 oracle."""

    class Oracle(Client):
        def decide(self, step):
            scale = 1.0 if step.scale is None else step.scale.double()
            self.expected = {
                name: parameter.grad.double() / scale
                for name, parameter in step.pl_module.named_parameters()
            }
            self.norms = step.norms

    client = Oracle()
    fit(Module(fused), client, **PRECISIONS[precision]())

    flat = torch.cat([grad.flatten() for grad in client.expected.values()])
    for p, total in client.norms.totals.items():
        torch.testing.assert_close(
            total.double(), torch.linalg.vector_norm(flat, p), rtol=1e-6, atol=0
        )
    assert set(client.norms.totals) == {1.0, 2.0, math.inf}
    assert list(client.norms.per_parameter[2.0]) == list(client.expected)
    for name, norm in client.norms.per_parameter[2.0].items():
        torch.testing.assert_close(norm.double(), client.expected[name].norm(), rtol=1e-6, atol=0)
    assert client.norms.finite.item() is True


def test_norms_of_unusual_gradients():
    """bf16 and fp16 accumulate in fp32; sparse, empty, complex and fp64 gradients are measured."""
    torch.manual_seed(0)
    dense = torch.randn(1000)
    places, values = torch.tensor([[0, 2, 2]]), torch.tensor([3.0, 1.0, 3.0])
    sparse = torch.sparse_coo_tensor(places, values, (5,), check_invariants=True)
    grads = {
        "half": (dense * 100).half(),
        "bf16": dense.bfloat16(),
        "double": dense.double(),
        "sparse": sparse,
        "empty": torch.zeros(0),
        "complex": torch.tensor([3 + 4j]),
    }
    norms = measure_norms(
        list(grads),
        list(grads.values()),
        totals=[2.0, math.inf],
        per_parameter=[2.0],
        finite=True,
        scale=None,
        device=torch.device("cpu"),
    )

    each = {name: value.item() for name, value in norms.per_parameter[2.0].items()}
    expected = {name: grads[name].to_dense().abs().double().norm().item() for name in grads}
    assert each == pytest.approx(expected, rel=1e-6)
    assert norms.totals[2.0].item() == pytest.approx(math.hypot(*expected.values()), rel=1e-6)
    assert norms.totals[math.inf].item() == grads["half"].abs().max().item()
    assert norms.finite.item() is True


def _many(dtype=torch.float32):
    """Name to gradient: small ones of all shapes, more than are collected at a time, and large ones."""
    torch.manual_seed(0)
    shapes = [(2000,), (3, 5), (), (0,), (64, 64), (10_000,)] * 80
    shapes += [(7,), (2, 9)]  # the only ones of their size
    return {str(i): torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}


def _measured(grads, **options):
    wanted = {"totals": [], "per_parameter": [], "finite": False, **options}
    device = torch.device("cpu")
    return measure_norms(list(grads), list(grads.values()), scale=None, device=device, **wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_a_total_is_the_same_number_whatever_is_asked_beside_it(p, dtype):
    """Logging single norms must not change what is clipped or skipped, not by a bit."""
    grads = _many(dtype)
    flat = torch.cat([grad.reshape(-1).double() for grad in grads.values()])

    alone = _measured(grads, totals=[p])
    together = _measured(grads, totals=[p, 7.0], per_parameter=[p], finite=True, evidence=True)

    assert alone.totals[p].item() == together.totals[p].item()
    assert alone.totals[p].item() == pytest.approx(flat.norm(p).item(), rel=1e-5)
    for name, norm in together.per_parameter[p].items():
        expected = grads[name].double().norm(p).item() if grads[name].numel() else 0.0
        assert norm.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float64, torch.half]])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_evidence_names_what_was_not_finite_when_gradients_are_gone(value, dtypes):
    """Small and large gradients, of one dtype and of several."""
    grads = {name: g.to(dtypes[int(name) % len(dtypes)]) for name, g in _many().items()}
    bad = {"0", "1", "2", "4", "5", "476", "478"}  # 3 has no elements
    for name in bad:
        grads[name].reshape(-1)[-1] = value

    norms = _measured(grads, finite=True, evidence=True)
    for grad in grads.values():
        grad.zero_()

    assert norms.finite.item() is False
    assert set(norms.evidence.non_finite()) == bad
    assert _measured(grads, finite=True, evidence=True).evidence.non_finite() == []
    assert _measured({}, finite=True, evidence=True).evidence.non_finite() == []
    assert _measured(grads, finite=True).evidence is None


def test_non_finite_gradients_are_found_and_named():
    """`finite` turns false on a NaN, and the names of the parameters can be had."""

    class Naming(Client):
        named = ()

        def decide(self, step):
            if self.attempt == 1 and not step.norms.finite:
                self.named = step.non_finite_parameters()

        def transform(self, step):
            super().transform(step)
            if self.attempt == 1:
                step.parameters[2].grad[0, 1] = math.nan

    client = Naming(request=GradientRequest(finite=True))
    fit(Module(), client)

    assert client.named == ["second.weight"]


class OwnClipping(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        for parameter in self.parameters():
            parameter.grad.mul_(0.25)


@pytest.mark.parametrize(
    ("module", "options", "known"),
    [
        (Module, {}, True),
        (Module, {"gradient_clip_val": 0.01}, True),
        (Module, {"gradient_clip_val": 1e6, "gradient_clip_algorithm": "norm"}, True),
        (Module, {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}, False),
        (OwnClipping, {}, False),
    ],
)
def test_clipped_norms_are_those_of_the_gradients_that_were_applied(module, options, known):
    """By coefficient or second pass, `step.clipped` is what is in `.grad` after the step."""
    client = Client(request=GradientRequest(totals=(1.0,), per_parameter=(2.0,), clipped=True))
    fit(module(), client, **options)

    step = client.step
    flat = torch.cat([grad.double().flatten() for grad in client.grads])
    torch.testing.assert_close(
        step.clipped.totals[1.0].double(), flat.abs().sum(), rtol=1e-5, atol=0
    )
    for norm, grad in zip(step.clipped.per_parameter[2.0].values(), client.grads, strict=True):
        torch.testing.assert_close(norm, grad.norm(), rtol=1e-5, atol=0)
    coefficient = step.clip_coefficient()
    assert (coefficient is not None) is known
    if known:
        ratio = step.clipped.totals[1.0] / step.norms.totals[1.0]
        torch.testing.assert_close(coefficient, ratio)


def test_nothing_is_measured_when_nobody_asks(monkeypatch):
    """Without a request at this step, no norm is computed."""
    calls = []
    original = torch._foreach_norm
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    asking = Client(request=None)
    asking.request = None
    fit(Module(), asking)
    silent = len(calls)
    fit(Module(), Client(request=GradientRequest(totals=(2.0,))))

    assert silent == 0
    assert len(calls) == 6


@pytest.mark.parametrize("norm_type", [0.0, -1.0, math.nan])
def test_a_norm_type_is_positive(norm_type):
    """A norm type that is none is refused with what to use."""
    with pytest.raises(ConfigError, match=r"Use 2\.0"):
        GradientRequest(totals=(norm_type,))


def test_groups_are_measured_in_one_pass(monkeypatch):
    """Each group has the norms that it would have alone, from one call for each norm type."""
    torch.manual_seed(0)
    tensors = {key: [torch.randn(5), torch.randn(2, 3)] for key in ("update", "exp_avg")}
    groups = {
        "update": TensorGroup(["a", "b"], tensors["update"], (2.0,), (2.0, math.inf)),
        "exp_avg": TensorGroup(["a", "b"], tensors["exp_avg"], (2.0,)),
        "nothing": TensorGroup([], [], (2.0,), (2.0,)),
    }
    passes = []
    measured = torch._foreach_norm
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda *a, **k: passes.append(len(a[0])) or measured(*a, **k)
    )

    found = measure_groups(groups, device=torch.device("cpu"))

    assert passes == [4, 2]
    for key, held in tensors.items():
        flat = torch.cat([t.double().flatten() for t in held])
        assert found[key].totals[2.0].item() == pytest.approx(flat.norm().item())
    largest = {n: t.abs().max() for n, t in zip("ab", tensors["update"], strict=True)}
    assert found["update"].per_parameter[math.inf] == largest
    assert set(found["update"].per_parameter) == {2.0, math.inf}
    assert found["exp_avg"].per_parameter == {}
    assert (found["nothing"].totals[2.0], found["nothing"].per_parameter) == (0.0, {2.0: {}})
