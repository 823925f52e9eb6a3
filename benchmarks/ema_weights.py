"""The nets whose weights are averaged: their shapes, without the nets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningModule
from torch import nn

__all__ = ["NETS", "QUICK_NETS", "Weights"]

Shapes = list[tuple[int, ...]]
_LARGE = 10_000_000


class Weights(LightningModule):
    """Parameters as a net in training has them, one storage each."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, shape in enumerate(shapes):
            weight = nn.Parameter((0.02 * torch.randn(shape)).to(dtype))
            self.register_parameter(f"weight{number}", weight)

    @property
    def num_elements(self) -> int:
        """Of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def is_large(self) -> bool:
        """Whether they are far larger than any cache."""
        return self.num_elements >= _LARGE


def _resnet50() -> Iterator[tuple[int, ...]]:
    def normed(out: int, width: int, kernel: int) -> Shapes:
        return [(out, width, kernel, kernel), (out,), (out,)]

    yield from normed(64, 3, 7)
    width = 64
    for inner, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            yield from normed(inner, width, 1)
            yield from normed(inner, inner, 3)
            yield from normed(4 * inner, inner, 1)
            if block == 0:
                yield from normed(4 * inner, width, 1)
            width = 4 * inner
    yield from [(1000, width), (1000,)]


def _gpt2_small() -> Iterator[tuple[int, ...]]:
    width = 768
    norm = [(width,), (width,)]
    yield from [(50257, width), (1024, width)]
    for _ in range(12):
        yield from norm
        yield from [(width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from norm
        yield from [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from norm


def _same(number: int, num_elements: int) -> Callable[[], Iterator[tuple[int, ...]]]:
    return lambda: iter([(num_elements,)] * number)


NETS: dict[str, Callable[[], Iterator[tuple[int, ...]]]] = {
    "ResNet-50": _resnet50,
    "GPT-2 small": _gpt2_small,
    "1,000 tensors of 1,000": _same(1000, 1000),
}
"""Name -> shapes: 161 tensors with 25.6 M elements, 148 with 124.4 M, and 1,000 with 1 M."""

QUICK_NETS = {
    "20 tensors of 2,000": _same(20, 2_000),
}
