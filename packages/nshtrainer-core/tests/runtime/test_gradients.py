from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, Adagrad, AdamW
from torch.utils.data import DataLoader

from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import (
    SCALER_SKIPPED,
    ClientConflictError,
    GradientRequest,
    StepOutcome,
)
from nshtrainer.runtime.optimizer_hooks import ObservedOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # tiny data
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 with torch 2.15
    # AMP: torch cannot see that a skipped optimizer step came first.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

ALL = GradientRequest(totals=(1.0, 2.0, math.inf), per_parameter=(2.0,), finite=True, clipped=True)


class Module(LightningModule):
    """Two layers; `poison` maps a batch number to the factor of its loss."""

    def __init__(self, make_optimizer=lambda p: AdamW(p, lr=0.1, weight_decay=0.1), poison=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 1)
        self.make_optimizer, self.poison = make_optimizer, poison or {}
        self.batches = 0

    def loss(self, batch):
        loss = self.second(self.first(batch).tanh()).square().mean()
        factor = self.poison.get(self.batches, 1.0)
        self.batches += 1
        return loss * factor

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def train_dataloader(self):
        return DataLoader(torch.arange(36.0).reshape(12, 3) / 36 + 0.1, batch_size=2)


class TwoOptimizers(Module):
    """Manual optimization of each layer by its own optimizer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [
            self.make_optimizer(self.first.parameters()),
            self.make_optimizer(self.second.parameters()),
        ]


def as_number(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def snapshot(step):
    """Weights and the whole optimizer state, cloned."""
    state = {
        step.names[i]: copy.deepcopy(dict(step.optimizer.state.get(p, {})))
        for i, p in enumerate(step.parameters)
    }
    return {n: p.detach().clone() for n, p in zip(step.names, step.parameters, strict=True)}, state


class Client(Callback):
    """Uses all phases and keeps what it saw; `skip` lists the attempts that it skips."""

    def __init__(self, skip=(), device=False, request=ALL, name="client"):
        self.skip, self.device, self.request, self.name = set(skip), device, request, name
        self.phases, self.seen, self.outcomes, self.events = [], [], [], []
        self.before, self.after = {}, {}
        self.attempt = -1

    def setup(self, trainer, pl_module, stage):
        self.pipeline = attach(trainer, self.name).gradients
        self.pipeline.register(
            self.name,
            transform=self.transform,
            request=lambda step: self.request,
            decide=self.decide,
            observe=self.observe,
            outcome=self.outcome,
        )

    def transform(self, step):
        self.attempt += 1
        self.phases.append("transform")

    def decide(self, step):
        self.phases.append("decide")
        self.before[self.attempt] = snapshot(step)
        skipped = self.attempt in self.skip
        return StepOutcome(torch.tensor(skipped) if self.device else skipped, "too large")

    def observe(self, step):
        self.phases.append("observe")
        self.seen.append(step)
        self.grads = [None if g is None else g.clone() for g in step.grads]

    def outcome(self, step, skipped):
        self.phases.append("outcome")
        self.after[self.attempt] = snapshot(step)
        self.outcomes.append(skipped)

    def on_optimizer_step_skipped(self, trainer, pl_module, count, reasons):
        self.events.append((trainer.global_step, count, tuple(reasons)))

    @property
    def skipped(self):
        return [bool(as_number(value)) for value in self.outcomes]


def fit(module, *callbacks, **options):
    options = {"log_every_n_steps": 2, "accelerator": "cpu", **options}
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module)
    return trainer


def scaled(**options):
    """Lightning's 16-mixed with a real GradScaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, **options)
    return MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0, equal_nan=True)
    # What a fused optimizer creates before it looks at the flag is as new: zeros, and no steps.
    for name, state in second[1].items():
        if first[1][name]:
            torch.testing.assert_close(state, first[1][name], rtol=0, atol=0, equal_nan=True)
        else:
            assert not any(v.any() for v in state.values() if v is not None)


OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "fused adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "fused adagrad": lambda p: Adagrad(p, lr=0.1, fused=True),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
}
PRECISIONS = {
    "32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "16 scaled": lambda: {"plugins": [scaled()]},
}


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_bitwise(optimizer, precision, device):
    """Weights, moments and step counters stay, whatever the optimizer, precision and flag."""
    client = Client(skip={0, 3}, device=device)
    trainer = fit(Module(OPTIMIZERS[optimizer]), client, **PRECISIONS[precision]())

    assert client.skipped == [True, False, False, True, False, False]
    for attempt in (0, 3):
        assert_same(client.before[attempt], client.after[attempt])
    for attempt in (1, 2, 4, 5):
        before, after = client.before[attempt][0], client.after[attempt][0]
        assert not torch.equal(before["first.weight"], after["first.weight"])
    assert sum(count for _, count, _ in client.events) == 2
    assert {reason for _, _, reasons in client.events for reason in reasons} == {"too large"}
    assert trainer.global_step == 6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_after_a_first_skip_equals_training_without_that_batch(optimizer):
    """A run that skips its first two batches ends bitwise where a run without them ends."""

    class Shifted(Module):
        def train_dataloader(self):
            return DataLoader((torch.arange(36.0).reshape(12, 3) / 36 + 0.1)[4:], batch_size=2)

    skipping, shifted = Module(OPTIMIZERS[optimizer]), Shifted(OPTIMIZERS[optimizer])
    fit(skipping, Client(skip={0, 1}, device=True))
    fit(shifted)

    for first, second in zip(skipping.parameters(), shifted.parameters(), strict=True):
        assert torch.equal(first, second)


def test_device_skip_of_a_fused_optimizer_never_asks_the_host():
    """The outcome stays a tensor and found_inf is taken off; plain optimizers get a bool."""
    fused, plain = Client(skip={2}, device=True), Client(skip={2}, device=True)
    fit(Module(OPTIMIZERS["fused adamw"]), fused)
    fit(Module(OPTIMIZERS["adamw"]), plain)

    assert all(isinstance(value, torch.Tensor) for value in fused.outcomes)
    assert not hasattr(fused.seen[0].optimizer, "found_inf")
    assert [type(value) for value in plain.outcomes] == [bool] * 6
    assert fused.pipeline.supports_device_skip(fused.seen[0].optimizer)
    assert not plain.pipeline.supports_device_skip(plain.seen[0].optimizer)


def test_device_skips_are_reported_at_logging_steps_and_host_skips_at_once():
    """Events: at once for what the host knows, else at the next logging step or at the end."""
    host, device = Client(skip={0, 2, 4}), Client(skip={0, 2, 4}, device=True)
    fit(Module(OPTIMIZERS["fused adamw"]), host, log_every_n_steps=4)
    fit(Module(OPTIMIZERS["fused adamw"]), device, log_every_n_steps=4)

    assert [(count, reasons) for _, count, reasons in host.events] == [(1, ("too large",))] * 3
    assert device.events == [(4, 2, ("too large",)), (6, 1, ("too large",))]


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_a_step_that_the_grad_scaler_skips_has_one_outcome(optimizer):
    """Overflow under AMP: skipped once, with the scaler's reason, and the scale is halved."""
    client = Client()
    plugin = scaled()
    fit(Module(OPTIMIZERS[optimizer], poison={2: math.inf}), client, plugins=[plugin])

    assert client.skipped == [False, False, True, False, False, False]
    assert client.phases.count("outcome") == client.phases.count("transform") == 6
    assert [(count, reasons) for _, count, reasons in client.events] == [(1, (SCALER_SKIPPED,))]
    assert plugin.scaler.get_scale() == 512.0


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_a_clients_skip_does_not_lower_the_loss_scale(optimizer):
    """The scaler backs off for overflow only."""
    plugin = scaled()
    fit(Module(OPTIMIZERS[optimizer]), Client(skip={1, 2}), plugins=[plugin])

    assert plugin.scaler.get_scale() == 1024.0


def test_will_log_marks_lightnings_logging_steps():
    """`will_log` is true exactly where step metrics would be sent."""
    client = Client()
    fit(Module(), client, log_every_n_steps=3)

    assert [step.will_log for step in client.seen] == [False, False, True] * 2
    assert [step.step for step in client.seen] == list(range(6))


def test_accumulation_runs_the_phases_once_per_optimizer_step():
    """Six micro-batches by threes: two rounds, on the mean gradient of three."""
    client = Client()
    fit(Module(lambda p: SGD(p, lr=0.0)), client, accumulate_grad_batches=3)

    module = Module()
    for batch in list(module.train_dataloader())[3:]:
        (module.loss(batch) / 3).backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    assert client.phases == ["transform", "decide", "observe", "outcome"] * 2
    torch.testing.assert_close(client.seen[-1].norms.totals[2.0], expected)


def test_manual_optimization_with_two_optimizers():
    """Each optimizer has its own parameters, names, index and skips."""
    client = Client(skip={0, 3})
    trainer = fit(TwoOptimizers(make_optimizer=OPTIMIZERS["adamw"]), client)

    assert [step.optimizer_index for step in client.seen] == [0, 1] * 6
    assert client.seen[0].names == ["first.weight", "first.bias"]
    assert client.seen[1].names == ["second.weight", "second.bias"]
    assert client.skipped == [attempt in {0, 3} for attempt in range(12)]
    assert all(type(step.optimizer) is AdamW for step in client.seen)
    assert trainer.global_step == 12


def test_manual_optimization_under_a_grad_scaler():
    """A step that the scaler skips is settled before the next optimizer's outcome is needed."""
    client = Client()
    fit(
        TwoOptimizers(make_optimizer=OPTIMIZERS["adamw"], poison={2: math.inf}),
        client,
        plugins=[scaled()],
    )

    assert len(client.outcomes) == 12
    skipped = [(s.optimizer_index, s.step) for s in client.seen if s.skipped]
    assert skipped == [(0, 2)]


def test_lbfgs_measures_each_evaluation_and_has_one_outcome_per_step():
    """The closure runs many times; a skip at the first evaluation leaves the weights."""
    client = Client(skip={0})
    fit(Module(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)), client)

    assert len(client.outcomes) == 6
    assert client.phases.count("transform") > 6
    assert client.skipped == [True] + [False] * 5
    assert torch.equal(client.before[0][0]["first.weight"], client.after[0][0]["first.weight"])


class Hookless:
    """An optimizer by duck typing, without torch's step hooks."""

    def __init__(self, parameters):
        self.inner = SGD(parameters, lr=0.1)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, {}, {}

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_optimizers_without_hooks_are_settled_at_the_end_of_the_batch():
    """Each attempt has its outcome all the same."""
    client = Client(skip={1})
    fit(Module(Hookless), client)

    assert client.skipped == [False, True, False, False, False, False]


def test_a_raw_step_past_lightning_has_an_outcome():
    """Weights that change without Lightning's hook are still reported to those who average them."""

    class Raw(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    client = Client()
    fit(Raw(), client)

    assert client.phases == ["outcome"] * 6
    assert client.skipped == [False] * 6


def test_order_within_a_phase_does_not_depend_on_the_order_of_callbacks():
    """Non-commuting transforms give bitwise the same weights in either order of callbacks."""

    class Adder(Client):
        def transform(self, step):
            for grad in step.grads:
                grad.add_(0.125)

        def decide(self, step):
            return None

    class Doubler(Adder):
        def transform(self, step):
            for grad in step.grads:
                grad.mul_(2.0)

    results = []
    for order in (1, -1):
        module = Module()
        fit(module, *[Adder(name="a"), Doubler(name="b")][::order])
        results.append([p.detach().clone() for p in module.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_outcomes_of_several_clients_are_joined():
    """Any client's skip is a skip, and the reasons of those who wanted it are told."""
    first, second = Client(skip={1}, name="a"), Client(skip={2}, device=True, name="b")
    fit(Module(OPTIMIZERS["fused adamw"]), first, second)

    expected = [False, True, True, False, False, False]
    assert first.skipped == second.skipped == expected


def test_two_clients_with_one_name_are_refused():
    """A second callback must not silently replace the first."""
    with pytest.raises(ClientConflictError, match="label of its own"):
        fit(Module(), Client(), Client())


def test_a_failing_client_stops_the_run_and_is_named():
    """The error of a client reaches the user with owner and phase."""

    class Failing(Client):
        def decide(self, step):
            raise ArithmeticError("no idea")

    with pytest.raises(ArithmeticError, match="no idea") as caught:
        fit(Module(), Failing(name="ema"))

    notes = getattr(caught.value, "__notes__", ["decide 'ema'"])
    assert any("decide" in note and "'ema'" in note for note in notes)


def test_a_caught_exception_in_a_step_does_not_upset_the_next_ones():
    """Manual optimization may catch an optimizer's error; later batches are settled as ever."""

    class Fragile(SGD):
        count = 0

        def step(self, closure=None):
            result = super().step(closure)
            Fragile.count += 1
            if Fragile.count == 2:
                raise RuntimeError("out of memory")
            return result

    class Catching(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            try:
                super().training_step(batch, batch_idx)
            except RuntimeError:
                return

        def optimizers(self, use_pl_optimizer=True):
            return [super().optimizers(use_pl_optimizer)]

        def configure_optimizers(self):
            return Fragile(self.parameters(), lr=0.1)

    client = Client()
    fit(Catching(), client)

    assert len(client.outcomes) == 6
    assert client.phases == ["transform", "decide", "observe", "outcome"] * 6


class LeavesAfter(Client):
    """Takes part in the first *count* batches, and in the last one again."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.count:
            self.pipeline.unregister(self.name)
        if batch_idx == trainer.num_training_batches - 1:
            self.pipeline.register(self.name, observe=self.observe, outcome=self.outcome)


def test_steps_without_a_client_cost_nothing_after_the_last_one_left(tmp_path, monkeypatch):
    """Its hooks wait on the optimizer for the next client, and look at no parameter."""
    looked = []
    original = ObservedOptimizer.parameters
    monkeypatch.setattr(
        ObservedOptimizer, "parameters", lambda *args: looked.append(1) or original(*args)
    )
    client = LeavesAfter(2)

    Trainer(
        callbacks=[client], accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(Module())  # fmt: skip

    assert len(looked) == 3
    assert len(client.outcomes) == 3
