"""Counting the operations that make the host wait for the device, on the CPU too.

On the CPU nothing waits, but the same calls are made, so a test without a GPU finds them.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self, override

__all__ = ["HostSyncs"]

# Below the dispatcher: whatever Python spelling led here (item, float, bool, format, index, in).
_DISPATCHED: Final = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "allclose",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
# Above it: on the CPU these do not reach the dispatcher, or look like a view.
_CALLED: Final = frozenset({"__array__", "cpu", "numpy", "tolist"})


class HostSyncs:
    """Counts host synchronizations of this thread inside a `with` block, by section.

    `section` is set by the caller while the block runs; what happens while it is None is not
    counted. Transfers to the CPU are counted from any device, and `.cpu()`, `.to("cpu")`,
    `.numpy()` and `.tolist()` on a CPU tensor too; `.to(other.device)` there is not.

    Attributes:
        section: What the next operations are counted under.
        counts: Section -> operation -> how often.
    """

    def __init__(self) -> None:
        self.section: Any = None
        self.counts: dict[Any, Counter[str]] = {}
        self._modes = (_Called(self), _Dispatched(self))

    def add(self, operation: str) -> None:
        """Count one *operation* under the present section."""
        if self.section is not None:
            self.counts.setdefault(self.section, Counter())[operation] += 1

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, traceback)  # pyright: ignore[reportUnknownMemberType] -- torch does not type it


class _Called(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CALLED or (name == "to" and _says_cpu(args[1:], kwargs or {})):
            self.syncs.add(name)
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] -- torch does not type it
        self.syncs = syncs

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_transfer = name in {"_to_copy", "copy_"} and _leaves_device(name, args, result)
        if name in _DISPATCHED or is_transfer or (name == "index" and _has_mask(args[1])):
            self.syncs.add(name)
        return result


def _says_cpu(args: Any, kwargs: dict[str, Any]) -> bool:
    targets = [*args, kwargs.get("device")]
    return any(isinstance(t, str) and torch.device(t).type == "cpu" for t in targets)


def _leaves_device(name: str, args: Any, result: Any) -> bool:
    source = args[1] if name == "copy_" else args[0]
    return (
        isinstance(source, Tensor)
        and isinstance(result, Tensor)
        and source.device.type != "cpu"
        and result.device.type == "cpu"
    )


def _has_mask(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in {torch.bool, torch.uint8} for i in indices)
