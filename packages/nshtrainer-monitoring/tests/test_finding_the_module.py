"""Explanations of a finding: the batch run again, and a file with what is needed to look closer."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from nshtrainer import create_callbacks
from nshtrainer.testing.traces import facts
from nshtrainer_monitoring import FiniteChecksCallback, FiniteChecksCallbackConfig
from nshtrainer_monitoring.finite_checks.batches import plain, tensors_in
from nshtrainer_monitoring.finite_checks.errors import NonFiniteGradientError, NonFiniteLossError
from nshtrainer_monitoring.finite_checks.preserving import parameters_unchanged, unchanged
from nshtrainer_monitoring.finite_checks.rng import RandomState

NAN = float("nan")
FIND = {"nonfinite_loss": "raise", "find_module": True}


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.INFO, "nshtrainer_monitoring")


def warnings(caplog):
    return [
        r.message
        for r in caplog.records
        if r.levelname == "WARNING" and r.name.startswith("nshtrainer_monitoring")
    ]


class Log(nn.Module):
    """NaN for what is below *limit*."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return torch.where(x < self.limit, NAN, x)


@pytest.fixture
def chain(net):
    """A module with a part that turns NaN at the batch *at*."""

    class Chain(net):
        def __init__(self, at=3, part=None, **options):
            super().__init__(**options)
            self.at = at
            self.body = nn.Sequential(nn.Linear(3, 3), part or Log(torch.inf), nn.Linear(3, 3))

        def training_step(self, batch, batch_idx):
            self.body[1].active = batch_idx == self.at
            return super().training_step(batch, batch_idx)

        def loss(self, batch):
            if getattr(self.body[1], "active", False):
                return super().loss(self.body(batch))
            return super().loss(self.body[2](self.body[0](batch)))

    return Chain


def test_the_first_module_is_named(chain, make_trainer):
    """The innermost module that made a NaN of finite input is in the error, with the batch."""
    with pytest.raises(
        NonFiniteLossError, match=r"is 'body\.1' \(Log\), in batch 3; its input is finite\."
    ):
        make_trainer(FiniteChecksCallback(**FIND)).fit(chain())


def test_all_accumulated_batches_are_looked_at(chain, make_trainer):
    """The batch may be any of those that the step is made of."""
    trainer = make_trainer(FiniteChecksCallback(**FIND), accumulate_grad_batches=3)

    with pytest.raises(NonFiniteLossError, match=r"'body\.1' \(Log\), in batch 4"):
        trainer.fit(chain(at=4))


def test_a_compiled_module_is_looked_into(net, make_trainer):
    """Parts of what was compiled before are found under their own names."""

    class Compiled(net):
        def __init__(self):
            super().__init__()
            parts = nn.Sequential(nn.Linear(3, 3), Log(torch.inf), nn.Linear(3, 3))
            self.body = torch.compile(parts, backend="eager")

        def loss(self, batch):
            return super().loss(self.body(batch))

    with pytest.raises(NonFiniteLossError, match=r"is 'body\.1' \(Log\), in batch 0"):
        make_trainer(FiniteChecksCallback(**FIND)).fit(Compiled())


def test_a_bad_batch_is_named(chain, make_trainer):
    """NaN in the data is said, with its place in the batch."""

    class Broken(chain):
        def train_dataloader(self):
            data = torch.ones(6, 2, 3)
            data[2, 1, 0] = NAN
            return DataLoader([{"x": x} for x in data], batch_size=None)

        def loss(self, batch):
            return super().loss(batch["x"])

    with pytest.raises(
        NonFiniteLossError, match=r"batch 2, which itself has NaN or Inf at \['x'\]"
    ):
        make_trainer(FiniteChecksCallback(**FIND), limit_val_batches=0).fit(Broken(at=-1))


def test_a_loss_that_breaks_after_the_modules_is_told_apart(net, make_trainer):
    """Where every module is fine, the loss itself is what to look at."""

    class Loss(net):
        def loss(self, batch):
            return super().loss(batch) / 0.0

    with pytest.raises(
        NonFiniteLossError, match="outputs of all modules are finite and the loss is"
    ):
        make_trainer(FiniteChecksCallback(**FIND)).fit(Loss())


def test_a_gradient_that_breaks_in_the_backward_pass_is_told_apart(net, make_trainer):
    """A finite forward pass is said to be one; the parameters are named as ever."""

    class Root(net):
        def loss(self, batch):
            return (
                super().loss(batch)
                + (self.second.bias - self.second.bias.detach()).abs().sqrt().sum()
            )

    callback = FiniteChecksCallback(nonfinite_grads="raise", find_module=True)

    with pytest.raises(
        NonFiniteGradientError, match=r"second\.bias\..* arises in the backward pass"
    ):
        make_trainer(callback).fit(Root())


class Unlucky(nn.Module):
    """NaN if its random numbers say so: of torch, Python and NumPy."""

    def forward(self, x):
        lucky = torch.rand(()) + random.random() + np.random.random() < 2.0  # noqa: S311 -- dice
        dropped = nn.functional.dropout(x, 0.5, self.training)
        return dropped if lucky else dropped * NAN


class Full(nn.Module):
    """Has all that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = Unlucky()
        self.calls, self.history, self.sums, self.names = 0, [], {"x": torch.zeros(3)}, set()
        self.total = torch.zeros(3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.history.append(x.detach().mean())
        self.sums["x"] += x.detach().sum(0)
        self.names.add(self.calls)
        self.total += 1
        self.steps = self.steps + 1
        self.late = self.calls
        return self.drop(self.norm(x))


@pytest.fixture
def full(net):
    class WithFull(net):
        def __init__(self):
            super().__init__(batches=24, logs={"training_step": ["train/loss"]})
            self.body = Full()

        def loss(self, batch):
            loss = super().loss(self.body(batch))
            if self.trainer.training:
                self.log("train/mean", loss, on_step=True, on_epoch=True)
                for logger in self.loggers:
                    logger.log_metrics({"direct": 1.0}, self.global_step)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return WithFull


@pytest.fixture
def run(full, make_trainer, memory_logger):
    """Train with the given options of the callback; everything that may differ afterwards."""

    def train(accumulate=1, **options):
        state = RandomState.take(torch.device("cpu"))
        try:
            torch.manual_seed(11)
            random.seed(11)
            np.random.seed(11)
            module, logger = full(), memory_logger()
            callback = FiniteChecksCallback(
                nonfinite_loss="skip", nonfinite_grads="skip", **options
            )
            trainer = make_trainer(callback, logger=logger, accumulate_grad_batches=accumulate)
            trainer.fit(module)
            body = module.body
            return {
                "weights": [p.detach().clone() for p in module.state_dict().values()],
                "random": RandomState.take(torch.device("cpu")).plain(),
                "body": (body.calls, body.history, body.sums, body.names, body.total, body.late),
                "logged": logger.calls,
                "facts": facts(module, trainer, trainer.optimizers),
            }
        finally:
            state.put_back()

    return train


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_second_run_is_the_first_one_and_leaves_nothing(run, caplog, accumulate):
    """It sees the same random numbers, and the training after it is bitwise that without it.

    Weights, BatchNorm statistics, counters, metrics, logs, hooks and random states are compared.
    """
    plain_run = run(accumulate)
    assert any("these steps were skipped" in message for message in warnings(caplog))
    caplog.clear()

    explained = run(accumulate, find_module=True)

    assert "is 'body.drop' (Unlucky)" in "".join(warnings(caplog))
    for what, value in plain_run.items():
        assert equal(explained[what], value), what


def test_only_the_first_finding_is_explained(chain, make_trainer, caplog, monkeypatch):
    """Running batches again is expensive, and done once in a run."""
    from nshtrainer_monitoring.finite_checks import rerun

    calls = []
    find = rerun.find_origin
    monkeypatch.setattr(rerun, "find_origin", lambda *a: calls.append(1) or find(*a))

    class Always(chain):
        def loss(self, batch):
            return super().loss(batch) * NAN

    callback = FiniteChecksCallback(nonfinite_loss="skip", nonfinite_grads="skip", find_module=True)
    make_trainer(callback).fit(Always())

    assert calls == [1]


def test_a_module_that_fails_the_second_time_is_reported(chain, make_trainer):
    """What the user's code raises then does not hide the finding, and leaves no hooks."""

    class Once(chain):
        def loss(self, batch):
            self.trainer.seen = getattr(self.trainer, "seen", 0) + 1
            if self.trainer.seen == 2:
                raise KeyError("gone")
            return super().loss(batch) * NAN

    module = Once()
    with pytest.raises(NonFiniteLossError, match="could not be run again: KeyError: 'gone'"):
        make_trainer(FiniteChecksCallback(**FIND)).fit(module)
    assert not any(part._forward_hooks for part in module.modules())
    assert "log" not in vars(module)


class Spoil(nn.Module):
    """NaN for everything, in the backward pass too."""

    def forward(self, x):
        return x * NAN


class Game(LightningModule):
    """Two players that take turns, as in adversarial training; everything that a module may do itself.

    From batch *at* on, *player*'s loss goes through a module that makes NaN.
    """

    def __init__(self, player=1, at=3, *, closures=False, direct=False):
        super().__init__()
        torch.manual_seed(3)
        self.automatic_optimization = False
        self.player, self.at, self.closures, self.direct = player, at, closures, direct
        self.players = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)) for _ in range(2)
        )
        self.bad = Spoil()
        self.target = nn.Linear(3, 3).requires_grad_(False)
        self.seen, self.trainable, self.rates = [], [], []

    def loss(self, batch, player):
        self.seen.append(self.global_step)
        self.trainable.append([p.requires_grad for p in self.parameters()])
        out = self.players[player](batch)
        other = self.players[1 - player](batch).detach()
        weight = self.players[player][0].weight
        (slope,) = torch.autograd.grad(out.sum(), weight, create_graph=True)  # a penalty
        if player == self.player and self.trainer.fit_loop.total_batch_idx >= self.at:
            out = self.bad(out)
        loss = (out - other).square().mean() + self.target(out).square().mean()
        loss = loss + slope.square().mean()
        self.log(f"train/loss{player}", loss)
        return loss

    def training_step(self, batch, batch_idx):
        schedulers = self.lr_schedulers()
        for player, optimizer in enumerate(self.optimizers()):
            with optimizer.toggle_model():
                self.turn(batch, player, optimizer)
            schedulers[player].step()
            with torch.no_grad():  # a slow copy that no optimizer sees
                pairs = zip(self.target.parameters(), self.players[0][0].parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, 0.1)

    def turn(self, batch, player, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch, player)
            loss.backward() if self.direct else self.manual_backward(loss)
            return loss

        if self.closures:
            optimizer.step(closure)
            return
        closure()
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        for parameter in self.players[player].parameters():
            parameter.grad.mul_(0.5)
        optimizer.step()

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(p.parameters(), lr=0.01) for p in self.players]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1, 0.9) for o in optimizers]

    def train_dataloader(self):
        return DataLoader(torch.sin(torch.arange(72.0)).reshape(24, 3), batch_size=4)


@pytest.mark.parametrize("options", [{}, {"closures": True}, {"direct": True}])
@pytest.mark.parametrize("player", [0, 1])
def test_the_module_is_found_in_manual_optimization(make_trainer, player, options):
    """Whichever optimizer's step it is, and however the module takes it."""
    trainer = make_trainer(FiniteChecksCallback(**FIND, nonfinite_grads="raise"), logger=False)
    expected = r"is 'bad' \(Spoil\), in batch 3; its input is finite\."

    with pytest.raises((NonFiniteLossError, NonFiniteGradientError), match=expected) as error:
        trainer.fit(Game(player, **options))

    assert trainer.global_step == 6 + player
    assert ("had taken 1 step before" in str(error.value)) is (player == 1)


@pytest.mark.parametrize("options", [{}, {"closures": True}, {"direct": True}])
def test_manual_optimization_goes_on_as_if_nothing_had_been_run_again(
    make_trainer, memory_logger, caplog, options
):
    """No step, gradient, weight, rate, metric, counter, frozen parameter or random number differs."""
    results = []
    for find in (False, True):
        torch.manual_seed(5)
        module, logger = Game(**options), memory_logger()
        callback = FiniteChecksCallback(
            nonfinite_loss="skip", nonfinite_grads="skip", find_module=find
        )
        trainer = make_trainer(callback, logger=logger)
        trainer.fit(module)
        results.append(
            {
                "weights": list(module.state_dict().values()),
                "seen": (module.seen, module.trainable, trainer.global_step),
                "rates": [o.param_groups[0]["lr"] for o in trainer.optimizers],
                "optimizers": [o.state_dict()["state"] for o in trainer.optimizers],
                "random": RandomState.take(torch.device("cpu")).plain(),
                "logged": logger.calls,
                "facts": facts(module, trainer, trainer.optimizers),
                "gradients": [0 if p.grad is None else p.grad for p in module.parameters()],
            }
        )

    assert "is 'bad' (Spoil), in batch 3" in "".join(warnings(caplog))
    for what, value in results[0].items():
        assert equal(results[1][what], value), what


def test_batches_whose_gradients_a_module_accumulates_itself_are_all_run(make_trainer):
    """The NaN is in the first of three batches whose gradients one step applies."""

    class Accumulating(Game):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            self.manual_backward(self.loss(batch if batch_idx != 3 else batch * NAN, 0))
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    trainer = make_trainer(FiniteChecksCallback(**FIND), logger=False)

    with pytest.raises(NonFiniteLossError, match=r"'players\.0\.0' \(Linear\), in batch 3"):
        trainer.fit(Accumulating(player=None))
    assert trainer.global_step == 1


def test_a_manual_loss_that_breaks_after_the_modules_is_told_apart(make_trainer):
    """The losses that were passed to `manual_backward` are looked at, as none are returned."""

    class Loss(Game):
        def loss(self, batch, player):
            return super().loss(batch, player) / 0.0

    with pytest.raises(NonFiniteLossError, match="outputs of all modules are finite and the loss"):
        make_trainer(FiniteChecksCallback(**FIND), logger=False).fit(Loss(player=None))


def test_parameters_that_are_written_to_or_moved_come_back():
    """In place, through `data`, by a foreach kernel, and by new memory; others are not copied."""
    module = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    before = [p.detach().clone() for p in module.parameters()]
    places = [p.data_ptr() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)

    with parameters_unchanged(module), torch.no_grad():
        module[0].weight.add_(1)
        module[0].bias.data.mul_(2)
        torch._foreach_zero_([module[1].weight, module[1].bias])
        module[2].weight.data = torch.zeros(2, 2)
        module[0].weight.grad.mul_(2)
        module[2].bias.grad = None

    assert [p.data_ptr() for p in module.parameters()] == places
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert all(p.grad.sum() == p.numel() for p in module.parameters())


def test_a_dump_has_all_that_is_needed(chain, make_trainer, tmp_path):
    """Batches, names and random states, readable where only plain data is allowed."""
    callback = FiniteChecksCallback(
        nonfinite_loss="raise", nonfinite_grads="raise", find_module=True, dump=True
    )
    trainer = make_trainer(callback, accumulate_grad_batches=2)
    module = chain()

    with pytest.raises(NonFiniteLossError, match="random states are in") as error:
        trainer.fit(module)

    path = tmp_path / "finite_checks" / "step0000000001-rank0.pt"
    assert str(path) in str(error.value)
    dump = torch.load(path, weights_only=True)
    batches = list(module.train_dataloader())[2:4]
    assert (dump["step"], dump["rank"], dump["module"]) == (1, 0, "body.1")
    assert [f["what"] for f in dump["findings"]] == ["loss", "gradients"]
    assert "first.weight" in dump["findings"][1]["names"]
    assert [b["batch_idx"] for b in dump["batches"]] == [2, 3]
    assert equal([b["batch"] for b in dump["batches"]], batches)
    assert {"python", "torch", "numpy"} <= set(dump["batches"][0]["random"])


def test_a_dump_goes_to_the_run_s_folder(chain, make_trainer, tmp_path):
    """Callbacks that are made from a configuration write beside the run's logs; the label is kept."""
    config = {"name": "finite_checks", "label": "x", "nonfinite_loss": "raise", "dump": True}
    callbacks = create_callbacks([config], id="run1", directory={"project_root": tmp_path})

    with pytest.raises(NonFiniteLossError):
        make_trainer(*callbacks).fit(chain())

    (path,) = (tmp_path / "nshtrainer_logs" / "run1" / "finite_checks").iterdir()
    assert path.name == "step0000000003-rank0-x.pt"
    assert torch.load(path, weights_only=True)["module"] is None


def test_a_dump_that_cannot_be_written_hides_nothing(chain, make_trainer, tmp_path, caplog):
    """The finding is what ends the run; the file is a warning."""
    (tmp_path / "taken").write_text("a file")
    callback = FiniteChecksCallback(
        nonfinite_loss="raise", dump=True, dump_dir=tmp_path / "taken" / "x"
    )

    with pytest.raises(NonFiniteLossError):
        make_trainer(callback).fit(chain())
    assert "the batches of step 3 could not be written" in warnings(caplog)[0]


@dataclass
class Point:
    x: torch.Tensor
    label: str


class Graph:
    """As those of PyTorch Geometric."""

    def to_dict(self):
        return {"edges": torch.ones(2)}


def test_batches_become_plain_data(tmp_path):
    """Whatever a batch is made of is read back with weights_only, at worst as text."""
    view = torch.arange(6.0).reshape(2, 3)[:, 0]
    batch = (
        {"a": [view, None, 1, 2.5, "s"], 3: Point(nn.Parameter(torch.ones(1)), "p")},
        Graph(), np.ones(2), object,
    )  # fmt: skip

    torch.save(plain(batch), tmp_path / "x.pt")
    read = torch.load(tmp_path / "x.pt", weights_only=True)

    assert equal(read[0]["a"], [view, None, 1, 2.5, "s"])
    assert equal(read[0][3], {"x": torch.ones(1), "label": "p"})
    assert equal(read[1], {"edges": torch.ones(2)})
    assert equal(read[2], torch.ones(2, dtype=torch.float64))
    assert read[3] == repr(object)
    assert [path for path, _ in tensors_in(batch)] == [
        "[0]['a'][0]", "[0][3]['x']", "[1]['edges']"
    ]  # fmt: skip


def test_random_states_are_put_back():
    """Python, NumPy and torch draw the same numbers again."""

    def draw():
        return random.random(), np.random.random(), torch.rand(3).tolist()  # noqa: S311 -- dice

    state = RandomState.take(torch.device("cpu"))
    first = draw()
    state.put_back()

    assert draw() == first


def test_nested_attributes_survive():
    """Dictionaries and lists in dictionaries are neither lost nor copied away."""
    module = nn.Linear(1, 1)
    module.held = {"inner": {"a": 1}, "list": [1], "set": {1}}
    held, inner = module.held, module.held["inner"]

    with unchanged(module):
        module.held["new"] = 1
        module.held = {}
        module.extra = 1

    assert module.held is held
    assert held == {"inner": {"a": 1}, "list": [1], "set": {1}}
    assert held["inner"] is inner
    assert not hasattr(module, "extra")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"find_module": True, "nonfinite_grads": "ignore"}, "give one of them an action"),
        ({"dump": True, "nonfinite_grads": False}, "remove `dump`"),
        ({"dump_dir": "x"}, "`dump_dir` is where `dump` writes"),
        ({"nonfinite_params": "skip"}, "nonfinite_params"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    """An option that cannot have an effect is an error of the configuration."""
    with pytest.raises(ValueError, match=message):
        FiniteChecksCallbackConfig.model_validate(options)
