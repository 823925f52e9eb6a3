from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from nshtrainer_monitoring import FiniteChecksCallback
from nshtrainer_monitoring.finite_checks.errors import MissingGradientError, NonFiniteGradientError
from nshtrainer_monitoring.finite_checks.findings import Throttle, shorten


@pytest.fixture
def poisoned(net):
    """A module whose gradients of *layer* get *value* at the batches in *at*; weights stay finite."""

    class Poisoned(net):
        def __init__(self, at, value=float("nan"), layer="second", **options):
            super().__init__(**options)
            self.at, self.value, self.layer = at, value, layer

        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.total_batch_idx in self.at:
                for parameter in getattr(self, self.layer).parameters():
                    parameter.grad = torch.full_like(parameter, self.value)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)  # 0 * nan would stay nan

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            before = [p.detach().clone() for p in self.parameters()]
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            with torch.no_grad():
                for parameter, value in zip(self.parameters(), before, strict=True):
                    parameter.copy_(value)

    return Poisoned


def warnings(caplog):
    return [r.message for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_raise_stops_before_the_weights_change(net, make_trainer, value):
    """The run ends at the step, names the offenders, and leaves the weights of before."""

    class Bad(net):
        def on_after_backward(self):
            if self.trainer.global_step == 3:
                self.before = [p.detach().clone() for p in self.parameters()]
                self.second.weight.grad[0, 0] = value

    module = Bad()
    trainer = make_trainer(FiniteChecksCallback(nonfinite_grads="raise"))

    with pytest.raises(
        NonFiniteGradientError, match=r"1 of 4 .* step 3: second\.weight\."
    ) as error:
        trainer.fit(module)
    assert "gradient_skipping" in str(error.value)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), module.before, strict=True))


def test_warn_reports_at_the_logging_step(poisoned, make_trainer, caplog):
    """Findings since the last logging step are one warning, with the first step and the names."""
    trainer = make_trainer(FiniteChecksCallback(), log_every_n_steps=4, max_epochs=2)

    trainer.fit(poisoned(at={1, 2}))

    (message,) = warnings(caplog)
    assert message.startswith("2 optimizer steps had NaN or Inf gradients (2 in this run)")
    assert "the first one at step 1, in second.weight, second.bias." in message


@pytest.mark.parametrize("bad_at", [1, 2, 3])
def test_offenders_are_named_where_gradients_come_and_go(poisoned, make_trainer, caplog, bad_at):
    """A parameter without a gradient at some steps does not shift the names of the others."""

    class ComesAndGoes(poisoned):
        def on_after_backward(self):
            super().on_after_backward()
            if self.trainer.global_step % 2:
                self.first.weight.grad = None

    callback = FiniteChecksCallback(none_grads="ignore")
    trainer = make_trainer(callback, log_every_n_steps=6, max_epochs=2)

    trainer.fit(ComesAndGoes(at={bad_at, 5}))

    assert any("in second.weight, second.bias." in message for message in warnings(caplog))


def test_the_first_finding_is_named_however_many_come_later(
    poisoned, make_trainer, caplog, monkeypatch
):
    """Steps are looked at a few at a time; what a later look finds does not replace it."""
    monkeypatch.setattr("nshtrainer_monitoring.finite_checks.findings._HELD", 2)

    class Wanders(poisoned):
        def on_after_backward(self):
            self.layer = "second" if self.trainer.global_step < 3 else "first"
            super().on_after_backward()

    trainer = make_trainer(FiniteChecksCallback(), log_every_n_steps=6, max_epochs=2)

    trainer.fit(Wanders(at={1, 4, 5}))

    message = warnings(caplog)[0]
    assert message.startswith("3 optimizer steps had NaN or Inf gradients")
    assert "the first one at step 1, in second.weight, second.bias." in message


def test_findings_after_the_last_logging_step_are_reported(poisoned, make_trainer, caplog):
    """What was found last is reported when training ends."""
    make_trainer(FiniteChecksCallback(), log_every_n_steps=50).fit(poisoned(at={5}))

    assert len(warnings(caplog)) == 1


def test_findings_before_an_exception_are_reported(poisoned, make_trainer, caplog):
    """A run that crashes says what it had found."""

    class Crash(poisoned):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(FiniteChecksCallback(), log_every_n_steps=50).fit(Crash(at={0}))
    assert len(warnings(caplog)) == 1


def test_warnings_become_rarer(poisoned, make_trainer, caplog):
    """A run that is beyond help warns a number of times that grows with its logarithm."""
    make_trainer(FiniteChecksCallback()).fit(poisoned(at=set(range(64)), batches=64))

    assert len(warnings(caplog)) == 7
    assert "(64 in this run)" in warnings(caplog)[-1]


def test_finite_gradients_are_not_mentioned(net, make_trainer, caplog):
    """A healthy run has no message, and the weights of a run without checks."""
    states = []
    for callbacks in (
        [],
        [FiniteChecksCallback()],
        [FiniteChecksCallback(nonfinite_grads="raise")],
    ):
        module = net()
        make_trainer(*callbacks).fit(module)
        states.append(module.state_dict())

    assert warnings(caplog) == []
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_large_gradients_are_not_infinite(poisoned, make_trainer):
    """Gradients whose squares overflow are finite all the same."""
    callback = FiniteChecksCallback(nonfinite_grads="raise")

    make_trainer(callback).fit(poisoned(at={2}, value=1e30))


def test_accumulation_is_checked_once_per_step(poisoned, make_trainer, caplog):
    """A NaN in one of four accumulated batches is one finding."""

    class Adding(poisoned):
        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.total_batch_idx == 1:
                self.second.bias.grad += float("nan")

    trainer = make_trainer(FiniteChecksCallback(), accumulate_grad_batches=4)
    trainer.fit(Adding(at=set(), batches=8))

    (message,) = warnings(caplog)
    assert message.startswith("1 optimizer steps had NaN or Inf gradients (1 in this run)")


@pytest.fixture
def unused(net):
    class Unused(net):
        def __init__(self, **options):
            super().__init__(**options)
            self.idle = torch.nn.Linear(2, 2)
            self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    return Unused


def test_missing_gradients_are_named_once(unused, make_trainer, caplog):
    """Parameters that take no part in the loss are one warning; frozen ones are meant to."""
    make_trainer(FiniteChecksCallback(), max_epochs=2).fit(unused())

    (message,) = warnings(caplog)
    assert message.startswith("2 parameters have no gradient at optimizer step 0")
    assert "idle.weight, idle.bias." in message


def test_missing_gradients_can_stop_the_run(unused, make_trainer):
    """With none_grads="raise" no step is made."""
    module = unused()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = make_trainer(FiniteChecksCallback(none_grads="raise"))

    with pytest.raises(
        MissingGradientError, match=r"2 of 8 parameters .* idle\.weight, idle\.bias"
    ):
        trainer.fit(module)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_ignore_means_silence(unused, make_trainer, caplog):
    """Both checks switched off by hand: nothing is said, nothing is registered."""
    callback = FiniteChecksCallback(nonfinite_grads=False, none_grads=False)

    make_trainer(callback).fit(unused())

    assert warnings(caplog) == []


@pytest.mark.parametrize("action", ["warn", "raise"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_searching_grad_scaler_is_no_finding(net, make_trainer, caplog, action, fused):
    """Overflows by which a GradScaler finds its scale pass; gradients that stay NaN do not."""

    class Scaled(net):
        nan = False

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

        def on_after_backward(self):
            if self.nan:
                self.second.weight.grad.fill_(float("nan"))

    def fit(module):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)  # overflows a few times
        trainer = make_trainer(
            FiniteChecksCallback(nonfinite_grads=action),
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        )
        trainer.fit(module)
        return scaler

    assert fit(Scaled(batches=20)).get_scale() < 2.0**26
    assert warnings(caplog) == []
    hopeless = Scaled(batches=20)
    hopeless.nan = True
    if action == "raise":
        with pytest.raises(NonFiniteGradientError, match="step 15"):
            fit(hopeless)
    else:
        fit(hopeless)
        assert warnings(caplog)


def test_several_optimizers_are_told_apart(net, make_trainer, caplog):
    """In manual optimization each optimizer's own parameters are checked at its own step."""

    class Bad(net):
        def on_after_backward(self):
            self.second.bias.grad.fill_(float("nan"))

    with pytest.raises(NonFiniteGradientError, match=r"1 of 2 parameters .*: second\.bias"):
        make_trainer(FiniteChecksCallback(nonfinite_grads="raise")).fit(Bad(optimizers=2))


def test_long_lists_are_cut():
    """Five names are shown, and the number of the others."""
    assert shorten([str(i) for i in range(7)]) == "0, 1, 2, 3, 4 and 2 more"
    assert shorten(["a", "b"]) == "a, b"


def test_throttle_lets_powers_of_two_through():
    """The 1st, 2nd, 4th and 8th of ten."""
    throttle = Throttle()

    assert [n for n in range(1, 11) if throttle.allows()] == [1, 2, 4, 8]


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.INFO, "nshtrainer_monitoring")
