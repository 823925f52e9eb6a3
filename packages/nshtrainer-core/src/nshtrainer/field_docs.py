"""What the string literals below fields say, read when somebody asks.

pydantic can read them while a class is made, which took a third of the time of importing every
configuration; the JSON schema, the command line and tests are the only readers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from itertools import pairwise

from pydantic import BaseModel

__all__ = ["field_docs"]


def field_docs(cls: type[BaseModel]) -> dict[str, str]:
    """Field -> documentation, for the fields of *cls* that have any, inherited ones included.

    `Field(description=...)` comes before a literal. A class without a source file (made by `exec`)
    has no literals to read.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _literals(base)
    found |= {n: f.description for n, f in cls.model_fields.items() if f.description}
    return {name: found[name] for name in cls.model_fields if name in found}


@functools.lru_cache(maxsize=512)
def _literals(cls: type[BaseModel]) -> dict[str, str]:
    try:
        (made,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or not alone in its lines
        return {}
    found: dict[str, str] = {}
    body: list[ast.stmt] = getattr(made, "body", [])
    for field, below in pairwise(body):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = inspect.cleandoc(text)
            case _:
                pass
    return found
