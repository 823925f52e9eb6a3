"""A copy of a checkpoint in CPU memory, whose buffers serve the next one again."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Snapshot"]

_LEAVES = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
)


class Snapshot:
    """Copies checkpoints while training waits; what is done with the copy no longer concerns it.

    Storages are copied rather than tensors, so tied tensors stay tied and the file that is made of
    the copy is the one that would have been made of the original. A buffer is used again where its
    size still fits: fresh memory costs as much as the copy itself.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return *checkpoint* with every tensor in CPU memory; valid until the next call.

        Tensors of a class of their own and sparse ones are copied one by one, where they are.
        """
        copying = _Copying(self._buffers)
        copied = copying.tree(checkpoint)
        copying.run()
        self._buffers = copying.used
        return copied

    def forget(self) -> None:
        """Give the memory back."""
        self._buffers = []


class _Copying:
    def __init__(self, buffers: list[Tensor]) -> None:
        self._free = buffers
        self.used: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._by_storage: dict[tuple[torch.device, int], Tensor] = {}

    def tree(self, value: Any) -> Any:
        """*value* with tensors over buffers that `run` fills."""
        kind = cast("type[Any]", type(value))
        if kind in _LEAVES:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind is dict:
            # Most of what is in a checkpoint are plain values; a call for each would take longest.
            return {k: v if type(v) in _LEAVES else self.tree(v) for k, v in value.items()}
        if kind is OrderedDict:
            ordered = cast("OrderedDict[Any, Any]", value)
            out: OrderedDict[Any, Any] = OrderedDict((k, self.tree(v)) for k, v in ordered.items())
            out.__dict__.update(self.tree(ordered.__dict__))  # a state_dict's _metadata
            return out
        if kind in (list, tuple):
            return cast("Any", kind([self.tree(v) for v in cast("list[Any]", value)]))
        return copy.deepcopy(value)

    def _tensor(self, tensor: Tensor) -> Tensor:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            return copy.deepcopy(tensor.detach())
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        buffer = self._by_storage.get(key) if storage.data_ptr() else None
        if buffer is None:
            buffer = self._buffer(storage.nbytes(), pinned=tensor.is_cuda)
            self.used.append(buffer)
            self._by_storage[key] = buffer
            if storage.nbytes() == tensor.nbytes and tensor.is_contiguous():
                copied = buffer.view(tensor.dtype).view(tensor.shape)
                self._sources.append(tensor)
                self._targets.append(copied)
                return copied
            source = _over(storage, (0, (storage.nbytes(),), (1,)), torch.uint8, tensor.device)
            self._sources.append(source)
            self._targets.append(buffer)
        place = cast("Any", (tensor.storage_offset(), tensor.size(), tensor.stride()))
        return _over(buffer.untyped_storage(), place, tensor.dtype, buffer.device)

    def _buffer(self, size: int, *, pinned: bool) -> Tensor:
        """The buffer of the last time if it fits: the same state comes in the same order."""
        index = len(self.used)
        if index < len(self._free):
            old = self._free[index]
            if old.numel() == size and old.is_pinned() == pinned:
                return old
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def run(self) -> None:
        """Copy everything, and wait until it is there."""
        if self._targets:
            with torch.no_grad():
                torch._foreach_copy_(self._targets, self._sources, non_blocking=True)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- one call for all
        for device in {s.device for s in self._sources if s.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _over(storage: Any, place: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that shows *storage* at *place*: offset, size and strides."""
    return torch.empty(0, dtype=dtype, device=device).set_(storage, *place)
