"""What a callback can leave behind on a module, its optimizers, the strategy and the process."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["differences", "facts", "first_difference", "random_states", "same", "weights_of"]

_ABSENT = "absent"


def facts(
    module: nn.Module, trainer: Trainer | None = None, optimizers: Iterable[Optimizer] = ()
) -> dict[str, Any]:
    """Return what can be seen on *module* and around it that a callback should have put back.

    Attributes, submodules, the number of hooks, `training` and `requires_grad` flags, global torch
    settings and hooks. Not part of it: weights (see `weights_of`), and signal handlers, which
    Lightning puts back.

    Args:
        module: The module that was trained.
        trainer: Its trainer, for the attributes of the strategy.
        optimizers: The optimizers that were used.

    Returns:
        A description of each fact and its value; compare two of them with `differences`.
    """
    found: dict[str, Any] = dict(_process())
    parts = cast("Iterator[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    for name, part in parts:
        found.update(_object(name or "module", part))
        found[f"{name or 'module'}.training"] = part.training
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found[f"{name}.requires_grad"] = parameter.requires_grad
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{hooks}"] = len(getattr(parameter, hooks, None) or ())
        found.update({f"{name}.{attribute}": True for attribute in vars(parameter)})
    for index, optimizer in enumerate(optimizers):
        found.update(_object(f"optimizers[{index}]", optimizer))
    if trainer is not None:
        found.update({f"trainer.strategy.{name}": True for name in vars(trainer.strategy)})
    return found


def _object(where: str, thing: object) -> Iterator[tuple[str, Any]]:
    attributes: dict[str, Any] = vars(thing)
    for name, value in attributes.items():
        is_hooks = "hooks" in name and isinstance(value, dict)
        yield f"{where}.{name}", len(cast("dict[Any, Any]", value)) if is_hooks else True
        if name in {"_modules", "_parameters", "_buffers"}:
            yield from ((f"{where}.{child}", True) for child in cast("dict[str, Any]", value))


def _process() -> Iterator[tuple[str, Any]]:
    yield "torch.get_default_dtype()", torch.get_default_dtype()
    yield "torch.is_grad_enabled()", torch.is_grad_enabled()
    yield "torch.is_anomaly_enabled()", torch.is_anomaly_enabled()
    yield "deterministic algorithms", torch.are_deterministic_algorithms_enabled()
    yield "float32 matmul precision", torch.get_float32_matmul_precision()
    for owner in map(importlib.import_module, ("torch.nn.modules.module", "torch.optim.optimizer")):
        attributes: dict[str, Any] = vars(owner)
        for name, value in attributes.items():
            if name.startswith("_global_") and isinstance(value, dict):
                yield f"{owner.__name__}.{name}", len(cast("dict[Any, Any]", value))
    yield "sys.excepthook", sys.excepthook


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describe each fact in which *found* differs from *expected*, sorted."""
    return [
        f"{name}: {found.get(name, _ABSENT)!r} instead of {expected.get(name, _ABSENT)!r}"
        for name in sorted({*found, *expected})
        if found.get(name, _ABSENT) != expected.get(name, _ABSENT)
    ]


def weights_of(module: LightningModule) -> dict[str, Tensor]:
    """Copies of the module's parameters and buffers, persistent or not, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def random_states() -> dict[str, Any]:
    """The states of the global random generators that are loaded: Python's, torch's, NumPy's."""
    states: dict[str, Any] = {"random": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        _, keys, *rest = numpy.random.get_state()
        states["numpy"] = (keys.tolist(), *rest)
    return states


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two nested values differ first, with both values; None if they are the `same`."""
    if same(one, other):
        return None
    pairs: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        left, right = cast("Mapping[Any, Any]", one), cast("Mapping[Any, Any]", other)
        keys = dict.fromkeys([*left, *right])
        pairs = ((k, left.get(k, _ABSENT), right.get(k, _ABSENT)) for k in keys)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        ones, others = cast("list[Any]", one), cast("list[Any]", other)
        if len(ones) == len(others):
            pairs = ((i, a, b) for i, (a, b) in enumerate(zip(ones, others, strict=True)))
    for key, a, b in pairs:
        if (found := first_difference(a, b, f"{where}[{key!r}]")) is not None:
            return found
    return f"{where or 'it'} is {one!r} instead of {other!r}"


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal: tensors bitwise, with dtype; NaN equals NaN."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return _same_tensors(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        left, right = cast("Mapping[Any, Any]", one), cast("Mapping[Any, Any]", other)
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(one, (list, tuple)):
        pair = cast("tuple[list[Any], list[Any]]", (one, other))
        return len(pair[0]) == len(pair[1]) and all(map(same, *pair))
    return bool(one == other) or (one != one and other != other)


def _same_tensors(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (
        t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)
    )
    return torch.equal(left, right)
