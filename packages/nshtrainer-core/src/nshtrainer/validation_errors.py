"""Rewriting pydantic's errors on their way out: where they are, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

__all__ = ["relocated", "with_field_hints"]


def relocated(error: ValidationError, *prefix: str) -> ValidationError:
    """*error* with *prefix* put before every location."""
    details = [_details(e, prefix) for e in error.errors(include_url=False)]
    return ValidationError.from_exception_data(error.title, details)


def with_field_hints(error: ValidationError, fields: Iterable[str]) -> ValidationError:
    """*error*, in which each unknown field of the top level names the nearest of *fields*."""
    problems = error.errors(include_url=False)
    if not any(p["type"] == "extra_forbidden" and len(p["loc"]) == 1 for p in problems):
        return error
    known = sorted(fields)
    details = [_details(p, ()) for p in problems]
    for problem, detail in zip(problems, details, strict=True):
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
            detail["type"] = _unknown_field(str(problem["loc"][0]), known)
    return ValidationError.from_exception_data(error.title, details)


def _unknown_field(name: str, known: list[str]) -> PydanticCustomError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
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
