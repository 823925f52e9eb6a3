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
    "MAX_INT",
    "Fraction",
    "Glob",
    "Int",
    "MetricName",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PlainData",
    "PositiveFloat",
    "PositiveInt",
    "Real",
]

# Patterns are compiled when they are first used: most runs never see such text.
_NON_FINITE = r"(?i:[+-]?(inf|infinity|nan))"
_LOOKS_LIKE_A_NUMBER = r"[+-]?\.?\d"


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError(
            "number_type", "a number is expected, not {value}", {"value": str(value)}
        )
    if isinstance(value, str) and not re.fullmatch(_NON_FINITE, value.strip()):
        hint = "; remove the quotes" if re.match(_LOOKS_LIKE_A_NUMBER, value.strip()) else ""
        raise PydanticCustomError(
            "number_type",
            "a number is expected, not the text {value}{hint}",
            {"value": repr(value), "hint": hint},
        )
    return value


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("not_nan", "NaN cannot be compared with anything; give a number")
    return value


MAX_INT = 2**63 - 1
"""The largest whole number that torch and TOML can hold."""

Int = Annotated[int, Field(strict=True, ge=-MAX_INT, le=MAX_INT)]
"""A whole number of 64 bits; booleans, text and 5.0 are refused."""
PositiveInt = Annotated[int, Field(strict=True, gt=0, le=MAX_INT)]
"""A whole number from 1, of 64 bits."""
NonNegativeInt = Annotated[int, Field(strict=True, ge=0, le=MAX_INT)]
"""A whole number from 0, of 64 bits."""
Real = Annotated[float, BeforeValidator(_number), AfterValidator(_not_nan)]
"""A number, infinity included, NaN not; booleans and text are refused."""
PositiveFloat = Annotated[Real, Field(gt=0)]
"""A number above 0; infinity allowed."""
NonNegativeFloat = Annotated[Real, Field(ge=0)]
"""A number from 0; infinity allowed."""
Fraction = Annotated[Real, Field(ge=0, le=1)]
"""A number in [0, 1]."""
Glob = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A shell pattern over names or paths, such as `encoder.*`; not empty."""

MetricName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""The name of a logged metric, not empty."""


_MAX_DEPTH = 64
_MAX_VALUES = 1_000_000
_MAX_BITS = 1024
_PLAIN = (
    "plain data is expected (text, numbers, true/false, null, lists, mappings with text keys), "
    "not {type}"
)


def _plain(value: Any) -> Any:
    """Return *value* as data that YAML and JSON give back unchanged; tuples become lists.

    What holds itself, and what a few YAML anchors multiply beyond all memory, is refused.
    """
    left = [_MAX_VALUES]

    def copied(value: Any, depth: int) -> Any:
        left[0] -= 1
        if depth > _MAX_DEPTH or left[0] < 0:
            raise PydanticCustomError(
                "plain_data",
                "plain data of at most {depth} levels and {values} values is expected; keep more in "
                "a file of its own",
                {"depth": _MAX_DEPTH, "values": _MAX_VALUES},
            )
        if isinstance(value, (list, tuple)):
            return [copied(v, depth + 1) for v in value]  # pyright: ignore[reportUnknownVariableType] -- Any in, Any out
        if isinstance(value, dict):
            return {_text_key(k): copied(v, depth + 1) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType] -- checked piece by piece
        return _scalar(value)

    return copied(value, 0)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return _short_int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PydanticCustomError(
                "plain_data", "{value} has no JSON form; write it as text", {"value": str(value)}
            )
        return float(value)
    raise PydanticCustomError("plain_data", _PLAIN, {"type": type(value).__name__})


def _short_int(value: int) -> int:
    if value.bit_length() > _MAX_BITS:
        raise PydanticCustomError(
            "plain_data",
            "a whole number of at most {bits} bits is expected; write it as text",
            {"bits": _MAX_BITS},
        )
    return int(value)


def _text_key(key: Any) -> str:
    if isinstance(key, str):
        return _text(key)
    kind = f"a mapping with a key of type {type(key).__name__}"
    raise PydanticCustomError("plain_data", _PLAIN, {"type": kind})


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "plain_data", "text that UTF-8 can hold is expected, not half a surrogate pair"
        ) from None
    return str(value)


PlainData = Annotated[Any, BeforeValidator(_plain)]
"""What YAML and JSON can say: text, finite numbers, booleans, null, lists, mappings with text keys."""
