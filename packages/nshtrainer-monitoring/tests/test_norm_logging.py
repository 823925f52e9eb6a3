from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from nshtrainer.errors import ConfigError
from nshtrainer.runtime import step_metrics
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import ClientConflictError, StepOutcome
from nshtrainer_monitoring import NormLoggingCallback, NormLoggingCallbackConfig
from nshtrainer_monitoring.norm_logging import callback as norm_logging
from nshtrainer_monitoring.norm_logging.modules import modules_of

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


EVERYTHING = {
    name: True for name in NormLoggingCallbackConfig.model_fields if name.startswith("log_")
}


class Around(Callback):
    """Weights before and after each step, and Adam's moments after it, in float64."""

    def __init__(self):
        self.before, self.after, self.moments = [], [], []

    def _weights(self, pl_module):
        return {n: p.detach().double().flatten().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(self._weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(self._weights(pl_module))
        (optimizer,) = trainer.optimizers
        state = {n: optimizer.state.get(p, {}) for n, p in pl_module.named_parameters()}
        self.moments.append(
            {
                kind: {n: s[kind].double().flatten().clone() for n, s in state.items() if kind in s}
                for kind in ("exp_avg", "exp_avg_sq")
            }
        )

    @property
    def updates(self):
        pairs = zip(self.before, self.after, strict=True)
        return [{n: after[n] - before[n] for n in before} for before, after in pairs]


def adam(fused=False, **options):
    return lambda module: torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused, **options)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_updates_and_moments_are_those_of_the_step(net, make_trainer, memory_logger, p, fused):
    """Norms of what the step changed, their ratio to the weights, and moments, as in float64."""
    logger, truth = memory_logger(), Around()
    options = dict.fromkeys(EVERYTHING, p)
    trainer = make_trainer(NormLoggingCallback(**options), truth, logger=logger)

    trainer.fit(net(configure=adam(fused)))

    changes = [norm(step.values(), p) for step in truth.updates]
    weights = [norm(step.values(), p) for step in truth.before]
    ratios = [u / w for u, w in zip(changes, weights, strict=True)]
    assert values(logger, "train/update_norm") == pytest.approx(changes, rel=1e-4)
    assert values(logger, f"train/update_{p}_norm_total") == pytest.approx(changes, rel=1e-4)
    assert values(logger, "train/update_ratio") == pytest.approx(ratios, rel=1e-4)
    for kind in ("exp_avg", "exp_avg_sq"):
        expected = [norm(step[kind].values(), p) for step in truth.moments]
        assert values(logger, f"train/{kind}_norm") == pytest.approx(expected, rel=1e-4)
    for name in truth.before[0]:
        single = [norm([step[name]], p) for step in truth.updates]
        held = [norm([step[name]], p) for step in truth.before]
        moments = [norm([step["exp_avg_sq"][name]], p) for step in truth.moments]
        ratios = [u / w for u, w in zip(single, held, strict=True)]
        assert values(logger, f"train/update_{p}_norm/{name}") == pytest.approx(single, rel=1e-4)
        assert values(logger, f"train/update_{p}_ratio/{name}") == pytest.approx(ratios, rel=1e-4)
        assert values(logger, f"train/exp_avg_sq_{p}_norm/{name}") == pytest.approx(
            moments, rel=1e-4
        )


@pytest.fixture
def deep(net):
    """Modules in modules, and a parameter that belongs to none."""

    class Deep(net):
        def __init__(self):
            super().__init__(configure=adam())
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.body = torch.nn.Sequential(
                torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)),
                torch.nn.Linear(3, 3),
            )

        def loss(self, batch):
            return super().loss(self.body(batch) * self.scale)

    return Deep


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_modules_are_rolled_up_to_the_depth(deep, make_trainer, memory_logger, p):
    """A module's norm is over all parameters below it; deeper modules are left out."""
    logger, truth, oracle = memory_logger(), Around(), Oracle()
    kinds = ("grad_norm", "param_norm", "update_norm", "update_ratio")
    options = {f"log_{kind}_per_module": p for kind in kinds}
    trainer = make_trainer(
        NormLoggingCallback(module_depth=2, **options), truth, oracle, logger=logger
    )

    trainer.fit(deep())

    name = f"train/grad_{p}_module_norm/"
    found = {n.removeprefix(name) for _, m in logger.calls for n in m if n.startswith(name)}
    assert found == {"first", "second", "body", "body.0", "body.1"}
    for module in found:

        def of(step, module=module):
            return norm([t for n, t in step.items() if n.startswith(f"{module}.")], p)

        expected = {"grad": oracle.grads, "param": truth.before, "update": truth.updates}
        for kind, steps in expected.items():
            logged = values(logger, f"train/{kind}_{p}_module_norm/{module}")
            assert logged == pytest.approx([of(step) for step in steps], rel=1e-4)
        ratios = [of(u) / of(w) for u, w in zip(truth.updates, truth.before, strict=True)]
        assert values(logger, f"train/update_{p}_module_ratio/{module}") == pytest.approx(
            ratios, rel=1e-4
        )


@pytest.mark.parametrize(
    ("name", "depth", "modules"),
    [
        ("scale", 3, []),
        ("a.b.weight", 1, ["a"]),
        ("a.b.weight", 2, ["a", "a.b"]),
        ("a.b.weight", 9, ["a", "a.b"]),
    ],
)
def test_modules_of_a_parameter(name, depth, modules):
    """Its ancestors, outermost first; none for a parameter of the LightningModule itself."""
    assert modules_of(name, depth) == modules


def test_globs_choose_single_parameters(net, make_trainer, memory_logger):
    """Only what is included and not excluded is logged singly; totals cover everything."""
    logger, oracle = memory_logger(), Oracle()
    callback = NormLoggingCallback(
        log_grad_norm_per_param=True, include=["first.*", "*.bias"], exclude=["first.bias"]
    )

    make_trainer(callback, oracle, logger=logger).fit(net())

    names = {n for _, m in logger.calls for n in m if n.startswith("train/grad_2.0_norm/")}
    assert names == {"train/grad_2.0_norm/first.weight", "train/grad_2.0_norm/second.bias"}
    totals = [norm(step.values(), 2) for step in oracle.grads]
    assert values(logger, "train/grad_2.0_norm_total") == pytest.approx(totals, rel=1e-5)


def test_a_glob_that_matches_nothing_is_refused(net, make_trainer):
    """A typo in a glob is an error before training, with names that there are."""
    callback = NormLoggingCallback(log_grad_norm_per_param=True, include=["fist.*"])
    trainer = make_trainer(callback)

    with pytest.raises(ConfigError, match=r"'fist\.\*', which matches no .* first\.bias"):
        trainer.fit(net())
    assert trainer.global_step == 0


def test_globs_without_single_parameters_are_refused():
    """Globs that would be ignored are refused in the configuration."""
    with pytest.raises(ValueError, match="switch on an option that ends in `_per_param`"):
        NormLoggingCallbackConfig(log_grad_norm=True, exclude=["a"])


def test_clip_coefficient_is_what_the_gradients_were_multiplied_by(
    net, make_trainer, memory_logger
):
    """At most 1, and the ratio of the norms after and before; clipping by value has none."""
    logger = memory_logger()
    trainer = make_trainer(
        NormLoggingCallback(log_grad_norm=True), logger=logger, gradient_clip_val=0.5
    )

    trainer.fit(net())

    before, after = values(logger, "train/grad_norm"), values(logger, "train/grad_norm_clipped")
    coefficients = values(logger, "train/grad_clip_coefficient")
    assert coefficients == pytest.approx([a / b for a, b in zip(after, before, strict=True)])
    assert min(coefficients) < 1.0
    assert trainer.callback_metrics["train/grad_clip_coefficient"] <= 1.0
    by_value = memory_logger()
    make_trainer(
        NormLoggingCallback(log_grad_norm=True),
        logger=by_value,
        gradient_clip_val=0.001,
        gradient_clip_algorithm="value",
    ).fit(net())
    assert values(by_value, "train/grad_clip_coefficient") == []


class Deciding(Callback):
    """Has the pipeline skip or scale each step."""

    def __init__(self, outcome):
        self.outcome = outcome

    def setup(self, trainer, pl_module, stage):
        attach(trainer, "deciding").gradients.register("deciding", decide=lambda step: self.outcome)


def test_other_callbacks_that_clip_are_in_the_coefficient(net, make_trainer, memory_logger):
    """What a callback multiplies gradients by counts as clipping, without the trainer's too."""
    logger = memory_logger()
    halving = Deciding(StepOutcome(False, "", coefficient=torch.tensor(0.5)))

    make_trainer(halving, NormLoggingCallback(log_grad_norm=True), logger=logger).fit(net())

    assert values(logger, "train/grad_clip_coefficient") == [0.5] * 6


@pytest.mark.parametrize("how", ["host", "device", "scaler"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_skipped_step_has_an_update_of_zero(net, make_trainer, memory_logger, how):
    """Whoever skips the step, nothing changed, and 0 is logged for update and ratio."""
    logger, plugins, others = memory_logger(), [], []
    if how == "scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=0.99)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        flag = True if how == "host" else torch.tensor(1.0)
        others = [Deciding(StepOutcome(flag, "for the test"))]
    options = {"log_update_norm": True, "log_update_ratio": True, "log_update_norm_per_param": True}
    trainer = make_trainer(*others, NormLoggingCallback(**options), logger=logger, plugins=plugins)

    trainer.fit(net(configure=adam(fused=how == "device")))

    for name in ("update_norm", "update_ratio", "update_2.0_norm/first.weight"):
        assert values(logger, f"train/{name}") == [0.0] * 6


def test_weights_are_copied_at_logging_steps_only(net, make_trainer, monkeypatch):
    """Steps that are not logged hold no second copy of the weights."""
    copied = []
    copies = norm_logging.copies
    monkeypatch.setattr(
        norm_logging, "copies", lambda tensors: copied.append(len(tensors)) or copies(tensors)
    )

    make_trainer(NormLoggingCallback(log_update_norm=True), log_every_n_steps=3).fit(net())

    assert copied == [4, 4]


def test_everything_takes_few_passes_and_one_transfer(
    net, make_trainer, memory_logger, monkeypatch
):
    """One pass over gradients, one over weights, one over updates and moments; one transfer."""
    passes, fetched = [], []
    measured, fetch = torch._foreach_norm, step_metrics.fetch
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda *a, **k: passes.append(len(a[0])) or measured(*a, **k)
    )
    monkeypatch.setattr(
        step_metrics, "fetch", lambda tensors: fetched.append(len(tensors)) or fetch(tensors)
    )

    trainer = make_trainer(NormLoggingCallback(**EVERYTHING), logger=memory_logger())
    trainer.fit(net(configure=adam(), batches=2))

    assert passes == [4, 4, 12] * 2
    assert len(fetched) == 2


@pytest.mark.parametrize("loggers", [0, 1])
def test_all_totals_reach_callbacks(net, make_trainer, memory_logger, loggers):
    """Tables and early stopping see every total, with loggers and without; no single norm."""
    built = [memory_logger() for _ in range(loggers)]
    trainer = make_trainer(
        NormLoggingCallback(**EVERYTHING), logger=built or False, gradient_clip_val=1.0
    )

    trainer.fit(net(configure=adam()))

    totals = {"grad_norm", "grad_norm_clipped", "grad_clip_coefficient", "param_norm"}
    totals |= {"update_norm", "update_ratio", "exp_avg_norm", "exp_avg_sq_norm"}
    totals |= {f"{k}_2.0_norm_total" for k in ("grad", "param", "update", "exp_avg", "exp_avg_sq")}
    ours = {n for n in trainer.callback_metrics if "norm" in n or "ratio" in n or "coeff" in n}
    assert ours == {f"train/{name}" for name in totals}


def test_labels_tell_two_callbacks_apart(net, make_trainer, memory_logger):
    """A label is part of every name, so two callbacks log beside each other."""
    logger = memory_logger()
    trainer = make_trainer(
        NormLoggingCallback(log_grad_norm=True, log_grad_norm_per_param=True),
        NormLoggingCallback(label="max", log_grad_norm="inf", log_grad_norm_per_param="inf"),
        logger=logger,
    )

    trainer.fit(net())

    two, largest = values(logger, "train/grad_norm"), values(logger, "train/grad_norm/max")
    assert len(two) == len(largest) == 6
    assert all(a > b for a, b in zip(two, largest, strict=True))
    assert values(logger, "train/grad_inf_norm/first.weight/max")
    assert {"train/grad_norm", "train/grad_norm/max"} <= set(trainer.callback_metrics)


def test_two_callbacks_without_a_label_are_refused(net, make_trainer):
    """Two that would write the same names are an error that says what to do."""
    trainer = make_trainer(
        NormLoggingCallback(log_grad_norm=True), NormLoggingCallback(log_param_norm=True)
    )

    with pytest.raises(ClientConflictError, match="label"):
        trainer.fit(net())


def test_an_optimizer_without_moments_is_said_once(net, make_trainer, memory_logger, caplog):
    """SGD has nothing to log; the option is named in one warning."""
    logger = memory_logger()
    trainer = make_trainer(NormLoggingCallback(log_moment_norm=True), logger=logger)

    with caplog.at_level(logging.WARNING, "nshtrainer_monitoring"):
        trainer.fit(net())

    (message,) = [r.message for r in caplog.records if r.name.startswith("nshtrainer_monitoring")]
    assert "log_moment_norm has nothing to log: SGD keeps neither" in message
    assert values(logger, "train/exp_avg_norm") == []


def test_weights_that_are_zero_have_an_infinite_ratio(net, make_trainer, memory_logger):
    """A bias that begins at zero shows as `inf`, not as an error or a NaN."""

    class Zero(net):
        def __init__(self):
            super().__init__()
            torch.nn.init.zeros_(self.second.bias)

    logger = memory_logger()
    callback = NormLoggingCallback(log_update_ratio_per_param=True)

    make_trainer(callback, logger=logger).fit(Zero())

    logged = values(logger, "train/update_2.0_ratio/second.bias")
    assert logged[0] == math.inf
    assert all(math.isfinite(value) for value in logged[1:])


def test_an_lbfgs_step_is_one_update(net, make_trainer, memory_logger):
    """However often the closure is evaluated, the update is that of the whole step."""
    logger, truth = memory_logger(), Around()

    def configure(module):
        return torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=4)

    callback = NormLoggingCallback(log_update_norm=True, log_param_norm=True)
    make_trainer(callback, truth, logger=logger).fit(net(configure=configure))

    changes = [norm(step.values(), 2) for step in truth.updates]
    weights = [norm(step.values(), 2) for step in truth.before]
    assert values(logger, "train/update_norm") == pytest.approx(changes, rel=1e-4)
    assert values(logger, "train/param_norm") == pytest.approx(weights, rel=1e-4)


def test_several_optimizers_have_their_own_updates(net, make_trainer, memory_logger):
    """In manual optimization each optimizer's update is of its own parameters."""
    logger = memory_logger()
    trainer = make_trainer(NormLoggingCallback(**EVERYTHING), logger=logger)
    module = net(optimizers=2)
    before = copy.deepcopy(module.state_dict())

    trainer.fit(module)

    for index, layer in enumerate(("first", "second")):
        name = f"train/optimizer_{index}/update_2.0_norm/{layer}.weight"
        whole = (module.state_dict()[f"{layer}.weight"] - before[f"{layer}.weight"]).norm()
        assert sum(values(logger, name)) >= whole > 0  # the triangle inequality
    assert values(logger, "train/optimizer_0/update_2.0_norm/second.weight") == []


def test_mixed_precisions_are_measured_together(net, make_trainer, memory_logger):
    """Parameters of two dtypes in one optimizer have updates, ratios and modules."""

    class Mixed(net):
        def __init__(self):
            super().__init__()
            self.second.double()

        def loss(self, batch):
            return self.second(torch.tanh(self.first(batch)).double()).square().mean()

    logger, truth = memory_logger(), Around()

    make_trainer(NormLoggingCallback(**EVERYTHING), truth, logger=logger).fit(Mixed())

    changes = [norm(step.values(), 2) for step in truth.updates]
    assert values(logger, "train/update_norm") == pytest.approx(changes, rel=1e-4)
    assert len(values(logger, "train/update_2.0_module_ratio/second")) == 6


def test_everything_changes_nothing(net, make_trainer):
    """Weights are bitwise those of a run without the callback, with every norm too."""
    states = []
    for callbacks in ([], [NormLoggingCallback(**EVERYTHING)]):
        module = net(configure=adam())
        make_trainer(*callbacks, max_epochs=2, gradient_clip_val=0.01).fit(module)
        states.append(module.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
