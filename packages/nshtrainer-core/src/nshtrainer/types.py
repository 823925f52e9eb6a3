"""Field types that say no early: numbers that are numbers, names that are names.

pydantic reads `True` as 1 and `"5"` as 5; a training run should not. A float field takes the
words that JSON needs for non-finite values (`"inf"`, `"Infinity"`, `"nan"`), and nothing else that
is a string.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

__all__ = [
    "Fraction",
    "Int",
    "MetricName",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PlainData",
    "PositiveFloat",
    "PositiveInt",
    "Real",
]

_NON_FINITE = re.compile(r"[+-]?(inf|infinity|nan)", re.IGNORECASE)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError(
            "number_type", "a number is expected, not {value}", {"value": str(value)}
        )
    if isinstance(value, str) and not _NON_FINITE.fullmatch(value.strip()):
        raise PydanticCustomError(
            "number_type",
            "a number is expected, not the text {value}; remove the quotes",
            {"value": repr(value)},
        )
    return value


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("not_nan", "NaN cannot be compared with anything; give a number")
    return value


Int = Annotated[int, Field(strict=True)]
"""A whole number; booleans, text and 5.0 are refused."""
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
"""A whole number from 1."""
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
"""A whole number from 0."""
Real = Annotated[float, BeforeValidator(_number), AfterValidator(_not_nan)]
"""A number, infinity included, NaN not; booleans and text are refused."""
PositiveFloat = Annotated[Real, Field(gt=0)]
"""A number above 0; infinity allowed."""
NonNegativeFloat = Annotated[Real, Field(ge=0)]
"""A number from 0; infinity allowed."""
Fraction = Annotated[Real, Field(ge=0, le=1)]
"""A number in [0, 1]."""
MetricName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""The name of a logged metric, not empty."""


def _plain(value: Any) -> Any:
    """Return *value* as data that YAML and JSON give back unchanged; tuples become lists."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PydanticCustomError(
                "plain_data", "{value} has no JSON form; write it as text", {"value": str(value)}
            )
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType] -- Any in, Any out
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):  # pyright: ignore[reportUnknownVariableType]
        return {k: _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    raise PydanticCustomError(
        "plain_data",
        "plain data is expected (text, numbers, true/false, null, lists, mappings with text keys), not {type}",
        {"type": type(value).__name__},
    )


PlainData = Annotated[Any, BeforeValidator(_plain)]
"""What YAML and JSON can say: text, finite numbers, booleans, null, lists, mappings with text keys."""
