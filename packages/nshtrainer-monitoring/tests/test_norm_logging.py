from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from nshtrainer.runtime import step_metrics
from nshtrainer_monitoring import NormLoggingCallback

EACH = {"log_grad_norm_per_param": True, "log_param_norm_per_param": True}
ALL = {"log_grad_norm": True, "log_param_norm": True, **EACH}


class Oracle(Callback):
    """Gradients and parameters in float64 before each step, taken with Lightning's own hook."""

    def __init__(self):
        self.grads = []
        self.params = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {n: p for n, p in pl_module.named_parameters() if id(p) in mine}
        self.grads.append({n: p.grad.double().flatten() for n, p in named.items()})
        self.params.append({n: p.detach().double().flatten() for n, p in named.items()})


def norm(tensors, p):
    return torch.linalg.vector_norm(torch.cat(list(tensors)), p).item()


def values(logger, name):
    return [float(value) for _, value in logger.values(name)]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_norms_are_those_of_the_step(net, make_trainer, memory_logger, p):
    """Totals and single norms equal a float64 loop over what the optimizer is about to use."""
    logger, oracle = memory_logger(), Oracle()
    options = dict.fromkeys(ALL, p)
    trainer = make_trainer(NormLoggingCallback(**options), oracle, logger=logger)

    trainer.fit(net())

    for kind, truth in (("grad", oracle.grads), ("param", oracle.params)):
        totals = [norm(step.values(), p) for step in truth]
        assert values(logger, f"train/{kind}_norm") == pytest.approx(totals, rel=1e-5)
        assert values(logger, f"train/{kind}_{p}_norm_total") == pytest.approx(totals, rel=1e-5)
        for name in truth[0]:
            single = [norm([step[name]], p) for step in truth]
            assert values(logger, f"train/{kind}_{p}_norm/{name}") == pytest.approx(
                single, rel=1e-5
            )


def test_once_per_step_and_only_when_logged(net, make_trainer, memory_logger):
    """With accumulation, the norm is that of the sum, at the steps that Lightning logs."""
    logger, oracle = memory_logger(), Oracle()
    trainer = make_trainer(
        NormLoggingCallback(**ALL),
        oracle,
        logger=logger,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        max_epochs=2,
    )

    trainer.fit(net(batches=8))

    own = [step for step, _ in logger.values("train/loss")]
    assert [step for step, _ in logger.values("train/grad_norm")] == own == [1, 3, 5, 7]
    expected = [norm(oracle.grads[step].values(), 2) for step in own]
    assert values(logger, "train/grad_norm") == pytest.approx(expected, rel=1e-5)


def test_nothing_is_computed_between_logging_steps(net, make_trainer, monkeypatch):
    """Steps that are not logged cost no norm."""
    calls = []
    measured = torch._foreach_norm
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda *a, **k: calls.append(1) or measured(*a, **k)
    )

    trainer = make_trainer(NormLoggingCallback(**ALL), log_every_n_steps=3)
    trainer.fit(net())

    assert len(calls) == 4  # gradients and parameters, at steps 2 and 5


def test_one_transfer_per_logging_step(net, make_trainer, memory_logger, monkeypatch):
    """However many names, the values reach the host together."""
    fetched = []
    fetch = step_metrics.fetch
    monkeypatch.setattr(
        step_metrics, "fetch", lambda tensors: fetched.append(len(tensors)) or fetch(tensors)
    )

    trainer = make_trainer(NormLoggingCallback(**ALL), logger=memory_logger())
    trainer.fit(net())

    assert fetched == [12] * 6  # 4 totals, 4 gradients, 4 parameters


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_shown_beside_the_raw_norm(net, make_trainer, memory_logger, algorithm):
    """grad_norm is before clipping, grad_norm_clipped after; without clipping it is left out."""
    logger = memory_logger()
    trainer = make_trainer(
        NormLoggingCallback(log_grad_norm=True),
        logger=logger,
        gradient_clip_val=0.001,
        gradient_clip_algorithm=algorithm,
    )

    trainer.fit(net())

    raw, clipped = values(logger, "train/grad_norm"), values(logger, "train/grad_norm_clipped")
    limit = 0.001 if algorithm == "norm" else 0.001 * math.sqrt(21)  # 21 parameters
    assert len(raw) == len(clipped) == 6
    assert all(c <= limit * 1.01 and c < r for r, c in zip(raw, clipped, strict=True))
    other = memory_logger()
    make_trainer(NormLoggingCallback(log_grad_norm=True), logger=other).fit(net())
    assert values(other, "train/grad_norm_clipped") == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_loss_scaling_is_undone(net, make_trainer, memory_logger, fused):
    """Under a GradScaler norms are those of the unscaled gradients, also where the optimizer unscales."""

    def configure(module):
        return torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)

    plain, scaled = memory_logger(), memory_logger()
    for logger, plugins in (
        (plain, []),
        (
            scaled,
            [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0))],
        ),
    ):
        callback = NormLoggingCallback(log_grad_norm=True)
        make_trainer(callback, logger=logger, plugins=plugins).fit(net(configure=configure))

    assert values(scaled, "train/grad_norm") == pytest.approx(
        values(plain, "train/grad_norm"), rel=0.02
    )


def test_several_optimizers_have_their_own_norms(net, make_trainer, memory_logger):
    """Each optimizer's norms cover its own parameters only."""
    logger, oracle = memory_logger(), Oracle()
    trainer = make_trainer(NormLoggingCallback(**ALL), oracle, logger=logger)

    trainer.fit(net(optimizers=2))

    for index, layer in enumerate(("first", "second")):
        truth = oracle.grads[index::2]
        assert set(truth[0]) == {f"{layer}.weight", f"{layer}.bias"}
        expected = [norm(step.values(), 2) for step in truth]
        prefix = f"train/optimizer_{index}"
        assert values(logger, f"{prefix}/grad_norm") == pytest.approx(expected, rel=1e-5)
        names = {n for _, m in logger.calls for n in m if n.startswith(f"{prefix}/param_2.0_norm/")}
        assert {n.rpartition("/")[2] for n in names} == set(truth[0])
    assert values(logger, "train/grad_norm") == []


def test_parameters_without_gradient_count_as_parameters(net, make_trainer, memory_logger):
    """A parameter that takes no part has no gradient norm, and still a parameter norm."""

    class Partial(net):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.full((9,), 100.0))

    logger = memory_logger()
    make_trainer(NormLoggingCallback(**ALL), logger=logger).fit(Partial())

    assert values(logger, "train/param_2.0_norm/unused") == [300.0] * 6
    assert values(logger, "train/grad_2.0_norm/unused") == []
    assert all(value > 300.0 for value in values(logger, "train/param_norm"))


@pytest.mark.parametrize("loggers", [0, 2])
def test_totals_reach_callbacks_and_every_logger(net, make_trainer, memory_logger, loggers):
    """Early stopping can wait for the norm, with any number of loggers; single norms stay out."""
    built = [memory_logger() for _ in range(loggers)]
    trainer = make_trainer(NormLoggingCallback(**ALL), logger=built or False)

    trainer.fit(net())

    assert trainer.callback_metrics["train/grad_norm"] > 0
    assert trainer.callback_metrics["train/param_norm"] > 0
    assert not [name for name in trainer.callback_metrics if "norm/" in name]
    assert all(values(logger, "train/grad_norm") for logger in built)


def test_training_is_not_changed(net, make_trainer):
    """Weights are bitwise those of a run without the callback."""
    states = []
    for callbacks in ([], [NormLoggingCallback(**ALL)]):
        module = net()
        make_trainer(*callbacks, max_epochs=2, gradient_clip_val=0.01).fit(module)
        states.append(module.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
