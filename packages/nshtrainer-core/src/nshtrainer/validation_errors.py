"""Rewriting pydantic's errors on their way out: where they are, and what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from .spelling import nearest

__all__ = ["clarified", "relocated"]


def relocated(error: ValidationError, *prefix: str) -> ValidationError:
    """*error* with *prefix* put before every location."""
    details = [_details(e, prefix) for e in error.errors(include_url=False)]
    return ValidationError.from_exception_data(error.title, details)


def clarified(error: ValidationError, fields: Iterable[str], data: Any) -> ValidationError:
    """*error* in words for a person; itself if there is nothing to clarify.

    An unknown field of the top level names the nearest of *fields*. Where pydantic tried several
    types on one value, there is one problem, whose place is that of the value.

    Args:
        error: What pydantic says.
        fields: The fields of the model.
        data: What was validated.
    """
    problems = error.errors(include_url=False)
    at_value: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in problems:
        at_value.setdefault(_place(data, problem["loc"]), []).append(problem)
    is_clear = all(loc == p["loc"] for loc, same in at_value.items() for p in same)
    if is_clear and not any(_is_unknown_field(p) for p in problems):
        return error
    known = sorted(fields)
    details = [_joined(loc, same, known) for loc, same in at_value.items()]
    return ValidationError.from_exception_data(error.title, details)


def _place(data: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """*loc* up to a value that holds no others: what follows there names the type that was tried."""
    for i, part in enumerate(loc):
        if data is None or isinstance(data, (str, bytes, int, float, timedelta)):
            return loc[:i]
        if isinstance(data, Mapping) and part in data:
            data = cast("Mapping[Any, Any]", data)[part]
        elif isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):  # pyright: ignore[reportUnknownArgumentType] -- of whatever
            data = cast("list[Any]", data)[part]
        else:
            return loc
    return loc


def _joined(loc: tuple[int | str, ...], problems: list[Any], known: list[str]) -> InitErrorDetails:
    first = problems[0]
    if len(problems) > 1:
        texts = dict.fromkeys(str(p["msg"]) for p in problems)
        kind = PydanticCustomError("no_type_fits", "{text}", {"text": "; or: ".join(texts)})
        return InitErrorDetails(type=kind, loc=loc, input=first["input"])
    detail = _details({**first, "loc": loc}, ())
    if _is_unknown_field(first):
        detail["type"] = _unknown_field(str(loc[0]), known)
    return detail


def _is_unknown_field(problem: Any) -> bool:
    return problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1


def _unknown_field(name: str, known: list[str]) -> PydanticCustomError:
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
    return PydanticCustomError(
        "extra_forbidden", "{text}", {"text": f"there is no such field; {hint}"}
    )


def _details(error: Any, prefix: tuple[str, ...]) -> InitErrorDetails:
    """One error to raise again: pydantic's own kinds keep their kind, custom ones their text."""
    context: dict[str, Any] = error.get("ctx") or {}
    kind: Any = error["type"]
    try:
        PydanticKnownError(kind, context or None)
    except (KeyError, TypeError, ValueError):
        kind = PydanticCustomError(kind, "{text}", {"text": error["msg"]})
        context = {}
    else:
        if kind == "extra_forbidden" and "text" in context:  # one of ours already
            kind = PydanticCustomError(kind, "{text}", context)
    return InitErrorDetails(
        type=kind, loc=(*prefix, *error["loc"]), input=error["input"], ctx=context
    )
