"""The random states of a process: taken without drawing a number, put back, and as plain data."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """The states of Python, NumPy (if it is loaded), torch and one device."""

    python: Any
    numpy: Any
    torch: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """Return the states as they are now; that of *device* too if it is not the CPU."""
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
            torch=torch.get_rng_state(),
            device=device,
            on_device=_device_state(device),
        )

    def put_back(self) -> None:
        """Make the states what they were."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        if self.on_device is not None:
            module: Any = torch.get_device_module(self.device)
            where = () if self.device.type == "mps" else (self.device,)
            module.set_rng_state(self.on_device, *where)

    def plain(self) -> dict[str, Any]:
        """Return the states as `torch.load(weights_only=True)` reads them; words are int64 tensors."""
        version, words, gauss = self.python
        state: dict[str, Any] = {
            "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
            "torch": self.torch,
        }
        if self.numpy is not None and self.numpy[0] == "MT19937":
            _, key, position, has_gauss, cached = self.numpy
            words = torch.tensor([int(word) for word in key], dtype=torch.int64)
            state["numpy"] = (words, int(position), int(has_gauss), float(cached))
        if self.on_device is not None:
            state[self.device.type] = self.on_device.cpu()
        return state


def _device_state(device: torch.device) -> Tensor | None:
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "get_rng_state"):
        return None
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
