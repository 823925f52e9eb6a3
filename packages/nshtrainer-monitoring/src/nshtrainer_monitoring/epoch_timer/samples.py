"""The number of samples in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from torch import Tensor

__all__ = ["samples_in"]


def samples_in(batch: Any) -> int | None:
    """Return the first dimension of the first tensor in *batch*; None where there is none.

    Looks into mappings, lists, tuples and dataclasses; a tensor without dimensions is one sample.
    Unlike Lightning's search it ends at the first tensor, and neither warns nor raises.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    for part in _parts(batch):
        if (samples := samples_in(part)) is not None:
            return samples
    return None


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return cast("Mapping[Any, Any]", batch).values()
    if isinstance(batch, (list, tuple)):
        return cast("Iterable[Any]", batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return (getattr(batch, field.name) for field in fields(batch))
    return ()
