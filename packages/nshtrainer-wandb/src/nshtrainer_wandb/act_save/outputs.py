"""Outputs of submodules, taken by forward hooks that are there at the steps that are stored only."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from nshtrainer.runtime.optimizer_hooks import plain_name
from nshtrainer.selection import NameSelection

from .config import Reducer
from .reducers import reduced, tensors_in

__all__ = ["ModuleOutputs", "submodules", "traces_hooks"]

log = logging.getLogger(__name__)

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What torch's activation checkpointing puts into the names of modules."""
_REASON = (
    "act_save stores a submodule's output, which compiled code is interrupted for; compile without "
    "fullgraph=True, or take the submodules inside out of act_save's `include`"
)


def submodules(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules below *root* by the names that its code has; of a wrapped one, the wrapper."""
    found: dict[str, nn.Module] = {}
    named = cast("Iterable[tuple[str, nn.Module]]", root.named_modules())
    for name, module in named:
        if plain := plain_name(f"{name}.").replace(_CHECKPOINT_WRAPPER, "").strip("."):
            found.setdefault(plain, module)
    return found


class ModuleOutputs:
    """The submodules that are chosen, and hooks that hand their outputs on.

    Args:
        root: The module whose submodules are looked at.
        selection: Their names.
        reducers: What is stored of each tensor; empty is itself.
        store: Called with names and tensors, without gradients.

    Raises:
        ConfigError: A glob matches no submodule.
    """

    def __init__(
        self,
        root: nn.Module,
        selection: NameSelection,
        reducers: Sequence[Reducer],
        store: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        modules = submodules(root)
        selection.check(modules)
        self._modules = {name: module for name, module in modules.items() if name in selection}
        self._reducers, self._store = reducers, store
        self._seen: set[str] = set()
        self._failed: set[str] = set()
        self._is_backward = False

    @property
    def unseen(self) -> list[str]:
        """Names of those that have given nothing yet."""
        return [name for name in self._modules if name not in self._seen]

    @contextmanager
    def attached(self) -> Generator[None]:
        """Hooks are on the chosen submodules inside."""
        with ExitStack() as hooks:
            for name, module in self._modules.items():
                hook = functools.partial(_take, self, name)
                hooks.callback(module.register_forward_hook(hook).remove)
            yield

    def set_backward(self, is_backward: bool) -> None:
        """Say whether gradients are computed: a forward pass is then activation checkpointing's."""
        self._is_backward = is_backward

    @torch.no_grad()
    def take(self, name: str, output: Any) -> None:
        """Store the *output* of the submodule *name*."""
        if self._is_backward:
            return
        self._seen.add(name)
        try:
            for path, tensor in tensors_in(output, name):
                self._store(dict(reduced(path, tensor.detach(), self._reducers)))
        except Exception as error:  # noqa: BLE001 -- a record is no reason to end a run
            if name not in self._failed:
                self._failed.add(name)
                log.warning("act_save cannot store the output of %r: %s", name, error)


def _uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    disable = cast("Any", torch.compiler).disable  # typed loosely by torch
    if "reason" in inspect.signature(disable).parameters:  # from torch 2.7 on
        return disable(function, reason=_REASON)
    return disable(function)


@_uncompiled  # once: torch keeps every function that it is told of
def _take(outputs: ModuleOutputs, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    outputs.take(name, output)


@contextmanager
def traces_hooks() -> Generator[None]:
    """Code that is compiled inside looks for hooks at each call, and so finds those that come later."""
    import torch._dynamo.config as dynamo

    before = dynamo.skip_nnmodule_hook_guards
    dynamo.skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        dynamo.skip_nnmodule_hook_guards = before
