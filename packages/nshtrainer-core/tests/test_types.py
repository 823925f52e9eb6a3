"""Field types that say no early, each with the words that help."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from nshtrainer import types

INF = math.inf
TOO_LARGE = 2**63

TAKES: dict[str, list[Any]] = {
    "Int": [0, -5, 2**63 - 1],
    "PositiveInt": [1, 2**63 - 1],
    "NonNegativeInt": [0, 1],
    "Real": [0, 1.5, -3, INF, -INF],
    "PositiveFloat": [1, 5e-324, INF],
    "NonNegativeFloat": [0, 0.0, INF],
    "Fraction": [0, 1, 0.5],
    "Glob": ["*", "encoder.*"],
    "MetricName": ["loss", "val/loss", "0"],
    "PlainData": [None, True, 1, 1.5, "a", [1, [2]], {"a": {"b": None}}],
}
REFUSES: dict[str, list[Any]] = {
    "Int": [True, "5", 5.0, None, TOO_LARGE, -TOO_LARGE, 10**5000],
    "PositiveInt": [0, -1, True, "1", 1.0, TOO_LARGE],
    "NonNegativeInt": [-1, False, "0", TOO_LARGE],
    "Real": [math.nan, True, "5", "", None, 10**5000, [1]],
    "PositiveFloat": [0, -1, -INF, math.nan, "nan", True, "2"],
    "NonNegativeFloat": [-1, -5e-324, math.nan, False],
    "Fraction": [-0.1, 1.1, INF, math.nan, True, "0.5"],
    "Glob": ["", " ", 3, None],
    "MetricName": ["", " ", "\n", 3, None],
    "PlainData": [INF, math.nan, {1}, {1: 2}, object(), b"x", 1j, "\ud800", {"\ud800": 1}, 2**1024],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    """One parameter set for each value."""
    return [
        pytest.param(name, v, id=f"{name}-{i}")
        for name, values in table.items()
        for i, v in enumerate(values)
    ]


def adapter(name: str) -> TypeAdapter[Any]:
    """The validator of the type called *name*."""
    return TypeAdapter(getattr(types, name))


@pytest.mark.parametrize(("name", "value"), cases(TAKES))
def test_what_fits_is_taken_as_it_is(name: str, value: Any):
    """A value that fits comes out equal."""
    assert adapter(name).validate_python(value) == value


@pytest.mark.parametrize(("name", "value"), cases(REFUSES))
def test_what_does_not_fit_is_refused(name: str, value: Any):
    """Booleans, text, NaN, what is out of range or has no form in a file: a validation error."""
    with pytest.raises(ValidationError):
        adapter(name).validate_python(value)


def test_every_type_is_in_both_tables():
    """A new type is put into the tables above."""
    assert set(TAKES) == set(REFUSES) == set(types.__all__) - {"MAX_INT"}


@pytest.mark.parametrize(
    ("text", "value"), [("inf", INF), ("Infinity", INF), ("-inf", -INF), (" INF ", INF)]
)
def test_real_numbers_take_the_words_that_json_needs(text: str, value: float):
    """JSON has no infinity but a word; `Infinity` is what our own JSON writes."""
    assert adapter("Real").validate_python(text) == value


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("Real", True, "a number is expected, not True"),
        ("Real", "5", "not the text '5'; remove the quotes"),
        ("Real", math.nan, "NaN cannot be compared with anything; give a number"),
        ("PlainData", INF, "inf has no JSON form; write it as text"),
        ("PlainData", {1: 2}, "a mapping with a key of type int"),
        ("PlainData", {"a": {1}}, "plain data is expected .* not set"),
        ("PlainData", 2**1024, "at most 1024 bits is expected; write it as text"),
        ("PlainData", ["\ud800"], "not half a surrogate pair"),
    ],
)
def test_the_message_says_what_to_do(name: str, value: Any, says: str):
    """What is expected, and the way out."""
    with pytest.raises(ValidationError, match=says):
        adapter(name).validate_python(value)


def test_plain_data_is_a_copy_with_lists_for_tuples():
    """What was put in can change afterwards; files know no tuples, subclasses of text or numbers."""

    class Text(str):
        __slots__ = ()

    given = {"a": (1, [Text("x")])}
    kept = adapter("PlainData").validate_python(given)
    given["a"][1].append("later")

    assert kept == {"a": [1, ["x"]]}
    assert type(kept["a"][1][0]) is str


def test_plain_data_that_holds_itself_or_multiplies_is_refused():
    """Both would fill the memory; neither ends in a RecursionError."""
    itself: list[Any] = []
    itself.append(itself)
    bomb: list[Any] = ["x"] * 101
    for _ in range(2):
        bomb = [bomb] * 100

    for value in (itself, bomb):
        with pytest.raises(ValidationError, match="at most 64 levels and 1000000 values"):
            adapter("PlainData").validate_python(value)
