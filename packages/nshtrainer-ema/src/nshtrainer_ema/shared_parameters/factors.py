"""Which parameters of a module are shared, and what their gradients are divided by."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from torch import Tensor, nn

from nshtrainer.errors import NshTrainerError

__all__ = [
    "SharedParameter",
    "SharedParametersError",
    "declared_parameters",
    "names_of_parameters",
    "tied_parameters",
]

_COMPILED = "_orig_mod"
"""Where `torch.compile` keeps the module that it wraps."""


class SharedParametersError(NshTrainerError, ValueError):
    """A module's `shared_parameters` is missing or does not say what it should."""


@dataclass(frozen=True, eq=False)
class SharedParameter:
    """One parameter whose gradient is divided."""

    parameter: Tensor
    """Held, so that no other tensor can get its id."""
    names: tuple[str, ...]
    """All of its names in the module."""
    factor: float
    """What the gradient is divided by."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def names_of_parameters(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the names of each parameter of *module* by its id; tied ones have several.

    Without the prefixes of `torch.compile`. A module that stands beside its own compiled wrapper
    (`self.net`, and `self.fast = torch.compile(self.net)`) counts once: these are two ways to call
    it, and not two uses of its weights.
    """
    modules = cast("Iterable[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    paths = [(path.split("."), each) for path, each in modules]
    bare = {id(each) for path, each in paths if _COMPILED not in path}
    names: dict[int, dict[str, None]] = {}
    for path, owner in paths:
        if _COMPILED in path and id(owner) in bare:
            continue
        prefix = [part for part in path if part and part != _COMPILED]
        own = owner.named_parameters(recurse=False, remove_duplicate=False)
        for name, parameter in own:
            names.setdefault(id(parameter), {})[".".join([*prefix, name])] = None
    return {key: tuple(found) for key, found in names.items()}


def tied_parameters(module: nn.Module) -> list[SharedParameter]:
    """Return the parameters that *module* has under several names, with the number of these."""
    names = names_of_parameters(module)
    return [
        SharedParameter(parameter, found, float(len(found)))
        for parameter in module.parameters()
        if len(found := names.get(id(parameter), ())) > 1
    ]


def declared_parameters(module: nn.Module) -> list[SharedParameter] | None:
    """Return what the property `shared_parameters` of *module* lists, each parameter once.

    None where it has no such property.

    Raises:
        SharedParametersError: The property raises, or is a method; an entry is not a pair; a
            parameter is not the module's own; a factor is not a finite number above 0; or a
            parameter is listed twice with different factors.
    """
    owner = type(module).__qualname__
    entries = _entries(module, owner)
    if entries is None:
        return None
    names = names_of_parameters(module)
    found: dict[int, SharedParameter] = {}
    for position, entry in enumerate(entries):
        listed = _checked_entry(entry, names, f"entry {position} of {owner}.shared_parameters")
        known = found.setdefault(id(listed.parameter), listed)
        if known.factor != listed.factor:
            raise SharedParametersError(
                f"{listed.name!r} is listed in {owner}.shared_parameters with the factors "
                f"{known.factor:g} and {listed.factor:g}; give one factor for each parameter."
            )
    return list(found.values())


def _checked_entry(entry: Any, names: dict[int, tuple[str, ...]], where: str) -> SharedParameter:
    is_sequence = isinstance(entry, (tuple, list))
    pair: Sequence[Any] = [*cast("Iterable[Any]", entry)] if is_sequence else []
    if len(pair) != 2:
        raise SharedParametersError(
            f"{where} is a {type(entry).__name__}; give pairs of a parameter and a factor, "
            "such as (self.embedding.weight, 2)."
        )
    parameter, factor = pair
    if not isinstance(parameter, Tensor):
        raise SharedParametersError(
            f"{where} begins with a {type(parameter).__name__}; give a parameter of the module, "
            "such as self.embedding.weight."
        )
    own = names.get(id(parameter))
    if own is None:
        raise SharedParametersError(
            f"{where} is a tensor of shape {tuple(parameter.shape)} that is not among the "
            "module's parameters; give the parameter itself, not a view or a copy of it."
        )
    return SharedParameter(parameter, own, _checked_factor(factor, own[0], where))


def _checked_factor(factor: Any, name: str, where: str) -> float:
    what = f"the factor of {name!r}, {where}, is"
    if not isinstance(factor, (int, float)) or isinstance(factor, bool):
        raise SharedParametersError(f"{what} {factor!r}; give a number, such as 2.")
    if not (factor > 0 and math.isfinite(factor)):
        raise SharedParametersError(
            f"{what} {factor}; gradients are divided by it, so give a finite number above 0."
        )
    return float(factor)


def _entries(module: nn.Module, owner: str) -> list[Any] | None:
    declared = inspect.getattr_static(module, "shared_parameters", None)
    if declared is None:
        return None
    if isinstance(declared, (FunctionType, staticmethod, classmethod)):
        raise SharedParametersError(
            f"{owner}.shared_parameters is a method and should be a property; put @property above it."
        )
    try:
        # Not by getattr: nn.Module turns an AttributeError inside of a property into a message
        # that the property itself does not exist.
        value: Any = (
            declared.__get__(module, type(module)) if hasattr(declared, "__get__") else declared
        )
        return list(value)
    except Exception as error:
        raise SharedParametersError(
            f"{owner}.shared_parameters raises {type(error).__name__}: {error}; "
            "it should return pairs of a parameter and a factor. Repair the property."
        ) from error
