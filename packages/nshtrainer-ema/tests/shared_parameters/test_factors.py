"""What is shared: told by the module, or found by the number of names that a parameter has."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from nshtrainer_ema.shared_parameters.factors import (
    SharedParametersError,
    declared_parameters,
    names_of_parameters,
    tied_parameters,
)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def with_property(function: Any) -> nn.Module:
    return type("Mine", (Module,), {"shared_parameters": property(function)})()


def declared(module: nn.Module) -> dict[str, float] | None:
    found = declared_parameters(module)
    return None if found is None else {each.name: each.factor for each in found}


def tied(module: nn.Module) -> dict[tuple[str, ...], float]:
    return {each.names: each.factor for each in tied_parameters(module)}


def test_listed_twice_is_divided_once():
    """The same tensor under two names is one parameter; the factor must be the same."""
    module = with_property(lambda self: [(self.a.weight, 2), (self.a.weight, 2.0)])
    assert declared(module) == {"a.weight": 2.0}

    module = with_property(lambda self: [(self.a.weight, 2), (self.a.weight, 3)])
    with pytest.raises(SharedParametersError, match=r"factors 2 and 3; give one"):
        declared_parameters(module)


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

    assert declared(module) == {"a.weight": 2.0}


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
        declared_parameters(with_property(function))


def test_a_method_in_the_place_of_the_property_is_named():
    """Forgetting `@property` is not the same as having none."""
    method = type("Mine", (Module,), {"shared_parameters": lambda self: []})()

    with pytest.raises(SharedParametersError, match="put @property above it"):
        declared_parameters(method)


def test_no_property_is_not_an_empty_one():
    """Ties may be looked for only in the first case."""
    assert declared(Module()) is None
    assert declared(with_property(lambda self: [])) == {}


def test_a_parameter_with_several_names_is_tied():
    """Its factor is the number of names, whether it or a module that holds it has several."""
    module = Module()
    module.c = module.d = nn.Linear(2, 2, bias=False)
    module.b.weight = module.a.weight

    assert tied(module) == {
        ("a.weight", "b.weight"): 2.0,
        ("c.weight", "d.weight"): 2.0,
    }
    assert tied(Module()) == {}


def test_two_names_in_one_module_count():
    """`self.up = self.down = nn.Parameter(...)`."""
    module = nn.Module()
    module.up = module.down = nn.Parameter(torch.ones(2))

    assert tied(module) == {("up", "down"): 2.0}


def test_a_module_beside_its_compiled_wrapper_is_no_tie():
    """Two ways to call it; nothing is compiled before the first call."""
    module = Module()
    module.fast = torch.compile(module.a)
    module.deep = torch.compile(nn.Sequential(nn.Linear(2, 2)))

    assert tied(module) == {}
    assert set(names_of_parameters(module).values()) == {
        ("a.weight",), ("a.bias",), ("b.weight",), ("b.bias",), ("deep.0.weight",), ("deep.0.bias",)
    }  # fmt: skip


def test_a_tie_into_a_compiled_module_is_one():
    """Names are those without the wrapper's prefix, and a listed parameter inside is found."""
    module = with_property(lambda self: [(self.head.weight, 3)])
    head = nn.Linear(2, 2)
    head.weight = module.a.weight
    module.head = torch.compile(head)

    assert tied(module) == {("a.weight", "head.weight"): 2.0}
    assert declared(module) == {"a.weight": 3.0}
