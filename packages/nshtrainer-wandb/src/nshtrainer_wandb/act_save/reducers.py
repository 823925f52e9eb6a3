"""What is stored of a tensor in place of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nshtrainer_wandb.watch.histogram import count_histograms

from .config import Reducer

__all__ = ["reduced", "tensors_in"]


def tensors_in(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a module's *output*, with *name* and their place in it: `decoder.0`.

    Args:
        output: A tensor, or mappings, lists and tuples of such; anything else is passed over.
        name: The module's name.
    """
    if isinstance(output, DTensor):
        yield name, output.to_local()  # this rank's part; the whole one would need every rank
    elif isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in cast("Mapping[Any, Any]", output).items():
            yield from tensors_in(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(cast("Sequence[Any]", output)):
            yield from tensors_in(value, f"{name}.{index}")


def reduced(name: str, tensor: Tensor, reducers: Sequence[Reducer]) -> Iterator[tuple[str, Tensor]]:
    """Yield what is stored of *tensor*, by name: itself without *reducers*, else one for each.

    `mean` and `l2_norm` have shape `()`, float32, on the tensor's device; of complex numbers the
    magnitude is taken. `histogram` gives `histogram.counts`, shape `(64,)`, and `histogram.edges`, shape
    `(65,)`, on the CPU, of the finite entries; one bin where they are all equal, nothing where there
    are none. It waits for the device.
    """
    if not reducers:
        yield name, tensor
        return
    values = (tensor.abs() if tensor.is_complex() else tensor).float()
    for reducer in reducers:
        if reducer == "mean":
            yield f"{name}.mean", values.mean()
        elif reducer == "l2_norm":
            yield f"{name}.l2_norm", torch.linalg.vector_norm(values)  # pyright: ignore[reportUnknownMemberType] -- torch has no type for it
        elif (counted := count_histograms({name: values}).get(name)) is not None:
            yield f"{name}.histogram.counts", torch.tensor(counted.counts)
            yield f"{name}.histogram.edges", torch.tensor(counted.edges)
