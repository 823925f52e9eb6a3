"""Shared parameters: gradients are divided once per optimizer step, and mistakes are named."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nshtrainer_ema import GradientSkippingCallback, SharedParametersCallback
from nshtrainer_ema.shared_parameters.callback import SharedParametersError, read_shared_parameters


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    class Shared(make_model):
        """Plain SGD at lr 1, so that a step is minus the gradient."""

        factors: dict[str, float] = {"first.weight": 2, "second.bias": 4.0}

        def __init__(self, **options: Any) -> None:
            super().__init__(torch.optim.SGD, **{"lr": 1e-3, **options})

        @property
        def shared_parameters(self) -> list[tuple[Tensor, float]]:
            return [(self.get_parameter(name), factor) for name, factor in self.factors.items()]

    return {"model": Shared, "plain": make_model, "trainer": make_trainer, "loader": make_loader}


def moves(model: Any, start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def first_step(make: Any, *callbacks: Any, batches: int = 1, **options: Any) -> dict[str, Tensor]:
    model = make["model"]()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make["trainer"](*callbacks, limit_val_batches=0, max_steps=1, **options)
    trainer.fit(model, make["loader"](batches))
    return moves(model, start)


@pytest.mark.parametrize(
    ("options", "batches"),
    [({}, 1), ({"accumulate_grad_batches": 4}, 4), ({"precision": "bf16-mixed"}, 1)],
    ids=["32", "accumulated", "bf16"],
)
def test_each_gradient_is_divided_once_per_optimizer_step(options, batches, make):
    """By its factor; with four accumulated batches too, not four times over."""
    plain = first_step(make, batches=batches, **options)
    scaled = first_step(make, SharedParametersCallback(), batches=batches, **options)

    for name, move in plain.items():
        factor = make["model"].factors.get(name, 1)
        torch.testing.assert_close(scaled[name], move / factor, rtol=1e-3, atol=1e-7)
        assert move.abs().sum() > 0


def test_under_a_loss_scaler_too(make, scaled):
    """16-mixed."""
    plain = first_step(make, plugins=[scaled()])
    divided = first_step(make, SharedParametersCallback(), plugins=[scaled()])

    torch.testing.assert_close(
        divided["first.weight"], plain["first.weight"] / 2, rtol=1e-3, atol=1e-7
    )


def test_what_is_measured_is_the_divided_gradient(make):
    """Wherever the callbacks stand in the list: the transform comes before the decision."""
    make["model"].factors = dict.fromkeys(
        ("first.weight", "first.bias", "second.weight", "second.bias"), 1e9
    )
    for order in (1, -1):
        skipping = GradientSkippingCallback(threshold=1e-3, start_after_n_steps=0)
        first_step(make, *(SharedParametersCallback(), skipping)[::order])
        assert (skipping.skipped_steps, skipping.seen_steps) == (0, 1)


def test_with_several_optimizers_each_divides_its_own(make):
    """A parameter is divided at its own optimizer's step, whatever others do before."""

    class Two(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (self.first, self.second)]

    plain = first_step(make)
    model = Two()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    trainer.fit(model, make["loader"](1))

    for name, move in moves(model, start).items():
        factor = model.factors.get(name, 1)
        torch.testing.assert_close(move, plain[name] / factor, rtol=1e-3, atol=1e-7)


def test_parameters_without_gradient_are_named_once(make, caplog):
    """A warning, not one per step."""

    class Unused(make["model"]):
        factors = {"unused": 2, "first.weight": 2}

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(1))

    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    trainer.fit(Unused(), make["loader"](4))
    warned = [r.getMessage() for r in caplog.records if "without a gradient" in r.getMessage()]

    assert len(warned) == 1
    assert "unused" in warned[0]
    assert "first.weight" not in warned[0]


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def with_property(function: Any) -> nn.Module:
    return type("Mine", (Module,), {"shared_parameters": property(function)})()


def test_listed_twice_is_divided_once():
    """The same tensor under two names is one parameter; the factor must be the same."""
    module = with_property(lambda self: [(self.a.weight, 2), (self.a.weight, 2.0)])
    assert read_shared_parameters(module) == {id(module.a.weight): ("a.weight", 2.0)}

    module = with_property(lambda self: [(self.a.weight, 2), (self.a.weight, 3)])
    with pytest.raises(SharedParametersError, match=r"factors 2 and 3; give one"):
        read_shared_parameters(module)


@pytest.mark.parametrize("declare", ["attribute", "cached"])
def test_an_attribute_or_a_cached_property_will_do(declare):
    """What matters is what `module.shared_parameters` gives."""
    if declare == "attribute":
        module = Module()
        module.shared_parameters = [(module.a.weight, 2)]
    else:
        pairs = functools.cached_property(lambda self: [(self.a.weight, 2)])
        pairs.__set_name__(Module, "shared_parameters")
        module = type("Mine", (Module,), {"shared_parameters": pairs})()

    assert list(read_shared_parameters(module).values()) == [("a.weight", 2.0)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda self: [(self.a.weight, 0)], r"'a\.weight'.*is 0; .*finite number above 0"),
        (lambda self: [(self.a.weight, -2)], r"is -2; .*finite number above 0"),
        (lambda self: [(self.a.weight, float("nan"))], r"is nan; .*finite number above 0"),
        (lambda self: [(self.a.weight, float("inf"))], r"is inf; .*finite number above 0"),
        (lambda self: [(self.a.weight, True)], r"is True; give a number"),
        (lambda self: [(self.a.weight, "2")], r"is '2'; give a number"),
        (lambda self: [(torch.ones(2), 2)], r"shape \(2,\) that is not among the module's"),
        (lambda self: [(self.a, 2)], r"begins with a Linear; give a parameter"),
        (lambda self: [self.a.weight], r"entry 0 of Mine.* is a Parameter; give pairs"),
        (lambda self: [(self.a.weight, 2, 3)], r"is a tuple; give pairs"),
        (lambda self: None, r"raises TypeError"),
        (lambda self: self.typo, r"raises AttributeError: .*typo.*Repair the property"),
        (lambda self: 1 / 0, r"raises ZeroDivisionError"),
    ],
)
def test_a_mistake_in_the_property_is_named(function, message):
    """What is wrong, where, and what to write instead."""
    with pytest.raises(SharedParametersError, match=message):
        read_shared_parameters(with_property(function))


def test_no_property_or_a_method_is_an_error_when_training_starts(make):
    """Not silence."""
    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    with pytest.raises(SharedParametersError, match=r"(?s)no `shared_parameters`.*@property"):
        trainer.fit(make["plain"](), make["loader"](1))

    method = type("Mine", (Module,), {"shared_parameters": lambda self: []})()
    with pytest.raises(SharedParametersError, match="put @property above it"):
        read_shared_parameters(method)
