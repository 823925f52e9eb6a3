"""The public names of each distribution and their signatures are those that were reviewed.

A change of the public interface shows in the diff of `tests/public_api.txt`. To accept it:

    python tests/test_public_api.py --write
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.fields import FieldInfo

SNAPSHOT = Path(__file__).with_name("public_api.txt")
PUBLIC = {
    "nshtrainer-core": (
        "nshtrainer",
        "nshtrainer.callbacks",
        "nshtrainer.callbacks.callback",
        "nshtrainer.hookspecs",
        "nshtrainer.loggers",
        "nshtrainer.plugins",
        "nshtrainer.run",
        "nshtrainer.errors",
        "nshtrainer.files",
        "nshtrainer.runtime.driver",
        "nshtrainer.runtime.events",
        "nshtrainer.runtime.gradients",
        "nshtrainer.runtime.step_metrics",
        "nshtrainer.runtime.weights",
        "nshtrainer.testing",
        "nshtrainer.trainer",
        "nshtrainer.types",
    ),
    "nshtrainer-checkpoint": ("nshtrainer_checkpoint",),
    "nshtrainer-ema": ("nshtrainer_ema",),
    "nshtrainer-monitoring": ("nshtrainer_monitoring",),
    "nshtrainer-wandb": ("nshtrainer_wandb",),
}
"""Distribution -> modules whose `__all__` is public; anything else may change."""


class _Shown:
    """Something whose `repr` is the given text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _annotation(value: Any) -> Any:
    """An annotation as the source states it, without quotes."""
    if value is inspect.Signature.empty:
        return value
    return _Shown(value if isinstance(value, str) else getattr(value, "__name__", repr(value)))


def _default(value: Any) -> Any:
    """A default, unless it is an object whose text differs from run to run."""
    plain = value is None or isinstance(value, bool | int | float | str | tuple)
    return value if plain or value is inspect.Parameter.empty else _Shown("...")


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [
        p.replace(default=_default(p.default), annotation=_annotation(p.annotation))
        for p in signature.parameters.values()
    ]
    returns = _annotation(signature.return_annotation)
    return str(signature.replace(parameters=parameters, return_annotation=returns))


def _field(name: str, annotation: Any, field: FieldInfo) -> str:
    default = _Shown("...") if field.default_factory else _default(field.default)
    value = "" if field.is_required() else f" = {default!r}"
    return f"    {name}: {_annotation(annotation)!r}{value}"


def _method(name: str, member: Any) -> str | None:
    if isinstance(member, property):
        return f"    {name} -> {member.fget.__annotations__.get('return', 'Any')}"
    if isinstance(member, functools.cached_property):
        return f"    {name} -> {member.func.__annotations__.get('return', 'Any')}"
    function = getattr(member, "__func__", member)  # of a class method or a static one
    return f"    {name}{_signature(function)}" if inspect.isfunction(function) else None


def _members(cls: type[Any], public: set[type[Any]]) -> Iterator[str]:
    """Fields and methods of *cls* and of its bases that are ours and not public themselves.

    What a foreign base class has (a hook of Lightning's) is its interface, not ours.
    """
    ours = [c for c in cls.__mro__ if c.__module__.startswith("nshtrainer")]
    foreign = [c for c in cls.__mro__ if c not in ours]
    seen: set[str] = set()
    for part in [cls, *(c for c in ours if c not in public and c is not cls)]:
        members = {name: member for name, member in vars(part).items() if name not in seen}
        seen |= members.keys() - {"__annotations__"}
        if issubclass(part, BaseModel):
            for name, annotation in members.get("__annotations__", {}).items():
                if (field := cls.model_fields.get(name)) is not None:
                    yield _field(name, annotation, field)
        elif inspect.isfunction(init := members.get("__init__")) and Protocol not in foreign:
            yield f"    __init__{_signature(init)}"
        for name, member in sorted(members.items()):
            if not name.startswith("_") and not any(name in vars(c) for c in foreign):
                line = _method(name, member)
                if line is not None:
                    yield line


def _describe(name: str, value: Any, public: set[type[Any]]) -> Iterator[str]:
    if isinstance(value, type):
        bases = ", ".join(b.__name__ for b in value.__bases__ if b is not object)
        yield f"  class {name}({bases})"
        yield from _members(value, public)
    elif inspect.isroutine(value):
        yield f"  def {name}{_signature(value)}"
    elif typing.get_origin(value) is not None:
        yield f"  {name}: a type"
    else:
        yield f"  {name}: {type(value).__name__}"


def public_api() -> str:
    """The public names of all distributions, as text; a name is described where it comes first."""
    lines: list[str] = []
    modules = [importlib.import_module(m) for group in PUBLIC.values() for m in group]
    every = [getattr(module, name) for module in modules for name in module.__all__]
    public = {value for value in every if isinstance(value, type)}
    for dist, names in PUBLIC.items():
        seen: set[int] = set()
        for module in names:
            namespace = importlib.import_module(module)
            lines.append(f"{dist}: {module}")
            for name in namespace.__all__:
                value = getattr(namespace, name)
                if isinstance(value, type) and id(value) in seen:
                    lines.append(f"  {name}")
                else:
                    lines += _describe(name, value, public)
                seen.add(id(value))
            lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def test_the_public_interface_is_the_reviewed_one() -> None:
    """Names and signatures that users rely on do not change unseen."""
    reviewed = SNAPSHOT.read_text(encoding="utf-8")
    now = public_api()
    changes = difflib.unified_diff(reviewed.splitlines(), now.splitlines(), lineterm="", n=1)

    assert reviewed == now, (
        "the public interface has changed; if that is meant, run "
        "`python tests/test_public_api.py --write` and review the diff:\n" + "\n".join(changes)
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {Path(__file__).name} --write")
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
