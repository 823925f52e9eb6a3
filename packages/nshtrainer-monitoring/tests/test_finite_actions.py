"""What the finite checks do about a finding: which steps are applied, and how a run ends."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from nshtrainer.testing.syncs import HostSyncs
from nshtrainer_monitoring import FiniteChecksCallback
from nshtrainer_monitoring.finite_checks.errors import (
    MissingGradientError,
    NonFiniteLossError,
    NonFiniteParameterError,
)

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.INFO, "nshtrainer_monitoring")


def warnings(caplog):
    return [
        r.message
        for r in caplog.records
        if r.levelname == "WARNING" and r.name.startswith("nshtrainer_monitoring")
    ]


@pytest.fixture
def bad(net):
    """A module whose loss is multiplied by *value* at the batches in *at*, so its gradients too."""

    class Bad(net):
        def __init__(self, at, value=NAN, optimizer=torch.optim.AdamW, **options):
            super().__init__(**options)
            self.at, self.value, self.optimizer = at, value, optimizer
            self.steps = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * self.value if self.trainer.fit_loop.total_batch_idx in self.at else loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.steps.append([p.detach().clone() for p in self.parameters()])

        def configure_optimizers(self):
            return self.optimizer(self.parameters(), lr=0.1)

    return Bad


class Stages(Callback):
    """Which ends of a run were reached."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append("validation")

    def on_train_end(self, trainer, pl_module):
        self.seen.append("end")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("option", ["nonfinite_grads", "nonfinite_loss"])
def test_stop_ends_the_run_in_order(bad, make_trainer, caplog, option):
    """No further batch is trained on, weights are clean, validation and the end hooks still run."""
    module, stages = bad({2}), Stages()
    trainer = make_trainer(FiniteChecksCallback(**{option: "stop"}), stages, max_epochs=5)

    trainer.fit(module)

    assert trainer.state.finished
    assert stages.seen == ["validation", "end"]
    assert len(module.steps) == 3
    assert same(module.steps[2], module.steps[1])
    assert any(
        "Training stops; the weights are those before the step." in m for m in warnings(caplog)
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("option", ["nonfinite_grads", "nonfinite_loss"])
def test_skip_leaves_out_the_step_and_goes_on(bad, make_trainer, caplog, option, fused):
    """Weights and moments of a bad step are those of before; all others are trained."""

    def adam(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, fused=fused)

    module = bad({2, 4}, optimizer=adam)
    quiet = {"nonfinite_grads": "ignore", "none_grads": "ignore"}
    trainer = make_trainer(FiniteChecksCallback(**{**quiet, option: "skip"}))

    trainer.fit(module)

    kept = [same(a, b) for a, b in zip(module.steps, module.steps[1:], strict=False)]
    assert kept == [False, True, False, True, False]
    (optimizer,) = trainer.optimizers
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
    assert "these steps were skipped" in warnings(caplog)[0]


def test_skipping_with_a_fused_optimizer_never_waits(bad, make_trainer):
    """Between logging steps, no value is read on the host."""
    syncs = HostSyncs()

    class Sections(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            syncs.section = batch_idx

    def adam(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, fused=True)

    def fit(*callbacks):
        syncs.counts, syncs.section = {}, None
        trainer = make_trainer(Sections(), *callbacks, log_every_n_steps=100, limit_val_batches=0)
        module = bad({2}, optimizer=adam, logs={})
        module.on_train_batch_end = lambda *args: setattr(syncs, "section", None)
        with syncs:
            trainer.fit(module)
        return syncs.counts

    plain = fit()

    assert fit(FiniteChecksCallback(nonfinite_grads="skip", nonfinite_loss="skip")) == plain


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_loss_is_found_before_the_step(bad, make_trainer, value):
    """With `raise` the run ends at that step, and the weights are those of before."""
    module = bad({3}, value)
    trainer = make_trainer(FiniteChecksCallback(nonfinite_loss="raise", nonfinite_grads="raise"))

    with pytest.raises(NonFiniteLossError, match="the loss is NaN or Inf at optimizer step 3"):
        trainer.fit(module)
    assert same(module.parameters(), module.steps[2])


def test_a_loss_of_any_accumulated_batch_counts(bad, make_trainer):
    """A NaN in the first of three accumulated batches stops their step."""
    module = bad({3})
    callback = FiniteChecksCallback(nonfinite_loss="raise", nonfinite_grads="ignore")
    trainer = make_trainer(callback, accumulate_grad_batches=3)

    with pytest.raises(NonFiniteLossError, match="optimizer step 1"):
        trainer.fit(module)
    assert same(module.parameters(), module.steps[3])


def test_losses_are_counted_between_logging_steps(bad, make_trainer, caplog):
    """One warning says how many there were since the last one, and where the first was."""
    callback = FiniteChecksCallback(nonfinite_loss="warn", nonfinite_grads="skip")
    trainer = make_trainer(callback, log_every_n_steps=4, max_epochs=2)

    trainer.fit(bad({1, 2}))

    losses = [m for m in warnings(caplog) if m.startswith("the loss")]
    assert losses == [
        "the loss of 2 batches was NaN or Inf (2 in this run), the first one at optimizer step 1. "
        'Set finite_checks.nonfinite_loss to "raise" to stop there.'
    ]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_an_infinite_loss_may_be_the_scale_of_a_grad_scaler(bad, make_trainer):
    """Under a GradScaler a loss that its scale makes infinite passes; NaN does not wait 16 steps."""

    def fit(value, at):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        callback = FiniteChecksCallback(nonfinite_loss="raise", nonfinite_grads="raise")
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = make_trainer(callback, plugins=[plugin])
        trainer.fit(bad(at, value))
        return scaler

    assert fit(1e4, {0, 1}).get_scale() < 2.0**120
    with pytest.raises(NonFiniteLossError, match="optimizer step 1"):
        fit(NAN, {1})


def test_in_manual_optimization_each_step_has_its_own_losses(net, make_trainer):
    """A NaN before the second optimizer's step is found there; the first one has stepped."""

    class Gan(net):
        def loss(self, batch):
            loss = super().loss(batch)
            self.calls = getattr(self, "calls", 0) + 1
            return loss * NAN if self.calls == 6 else loss  # logged once, then one per optimizer

    module = Gan(optimizers=2)
    callback = FiniteChecksCallback(nonfinite_loss="raise", nonfinite_grads="ignore")
    trainer = make_trainer(callback)

    with pytest.raises(NonFiniteLossError, match="optimizer step 3"):
        trainer.fit(module)


@pytest.mark.parametrize("action", ["raise", "stop", "warn"])
def test_bad_weights_are_found_when_training_starts(net, make_trainer, caplog, action):
    """Weights that were loaded with a NaN are named before the first batch."""
    module = net()
    with torch.no_grad():
        module.second.weight[0, 1] = NAN
    callback = FiniteChecksCallback(nonfinite_params=action, nonfinite_grads="ignore")
    trainer = make_trainer(callback)

    if action == "raise":
        with pytest.raises(
            NonFiniteParameterError, match=r"1 of 4 .* when training starts: second\.weight\."
        ):
            trainer.fit(module)
    else:
        trainer.fit(module)
        assert "when training starts: second.weight." in warnings(caplog)[0]
    assert trainer.global_step == {"raise": 0, "stop": 0, "warn": 6}[action]


def test_weights_that_became_bad_are_found_at_a_logging_step(net, make_trainer):
    """An update that breaks the weights is found after it, at the next step that is logged."""

    class Breaking(net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                with torch.no_grad():
                    self.first.bias[0] = INF

    callback = FiniteChecksCallback(nonfinite_params="raise", nonfinite_grads="ignore")
    trainer = make_trainer(callback, log_every_n_steps=4)

    with pytest.raises(NonFiniteParameterError, match=r"after optimizer step 3: .*first\.bias"):
        trainer.fit(Breaking())


def test_large_weights_are_not_infinite(net, make_trainer):
    """Weights whose squares overflow are finite all the same."""

    class Huge(net):
        def __init__(self):
            super().__init__()
            self.huge = torch.nn.Parameter(torch.full((2,), 1e30))

    make_trainer(FiniteChecksCallback(nonfinite_params="raise")).fit(Huge())


@pytest.fixture
def unused(net):
    class Unused(net):
        def __init__(self):
            super().__init__()
            self.idle = torch.nn.Linear(2, 2)
            self.before = [p.detach().clone() for p in self.parameters()]

    return Unused


@pytest.mark.parametrize(("action", "batches"), [("stop", 1), ("skip", 6)])
def test_missing_gradients_can_stop_or_skip(unused, make_trainer, caplog, action, batches):
    """No step without them is applied, the parameters are named once, and the run ends in order."""
    module = unused()
    trainer = make_trainer(FiniteChecksCallback(none_grads=action))

    trainer.fit(module)

    assert trainer.state.finished
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == batches
    assert same(module.parameters(), module.before)
    (message,) = [m for m in warnings(caplog) if "no gradient" in m]
    assert "idle.weight, idle.bias" in message


def test_the_cause_is_raised_before_its_consequence(unused, make_trainer):
    """A NaN loss is reported as such, whatever else is wrong with the step."""

    class Both(unused):
        def loss(self, batch):
            return super().loss(batch) * NAN

    actions = dict.fromkeys(("nonfinite_loss", "nonfinite_grads", "none_grads"), "raise")

    with pytest.raises(NonFiniteLossError):
        make_trainer(FiniteChecksCallback(**actions)).fit(Both())
    with pytest.raises(MissingGradientError):
        make_trainer(FiniteChecksCallback(**actions)).fit(unused())


def test_a_second_fit_starts_anew(bad, make_trainer):
    """What was found in one run does not stop the next."""
    trainer = make_trainer(FiniteChecksCallback(nonfinite_loss="stop"))
    trainer.fit(bad({0}))
    assert trainer.global_step == 1

    trainer = make_trainer(*[c for c in trainer.callbacks if isinstance(c, FiniteChecksCallback)])
    trainer.fit(bad(set()))

    assert trainer.global_step == 6
