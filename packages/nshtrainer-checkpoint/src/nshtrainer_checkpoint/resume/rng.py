"""The random states of a process as plain data, read and put back without drawing a number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch

__all__ = ["generators_of", "put_back", "read", "same", "take"]


def read(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Return the states of Python, NumPy, torch and CUDA, and of *generators*.

    The numbers are tensors, so that `torch.load(weights_only=True)` reads them. CUDA's are there,
    one for each visible device, only once CUDA is in use; NumPy's only while its global generator
    is the Mersenne Twister, as it is unless someone replaces it.
    """
    return take(generators)()


def take(generators: Sequence[torch.Generator] = ()) -> Callable[[], dict[str, Any]]:
    """Note the states now and return what gives them as `read` does: half the time, once a batch."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "generators": [g.get_state() for g in generators],
    }
    twister = np.random.get_state(legacy=False)  # the global one is what loaders draw from
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()

    def give() -> dict[str, Any]:
        numpy: dict[str, Any] = {}
        if twister["bit_generator"] == "MT19937":
            inner = twister["state"]
            numpy["numpy"] = (
                _packed(inner["key"]), int(inner["pos"]),
                int(twister["has_gauss"]), float(twister["gauss"]),
            )  # fmt: skip
        return {"python": (version, _packed(words), gauss), **state, **numpy}

    return give


def put_back(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Set what `read` returned; devices and *generators* that it does not know stay as they are."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_unpacked(words)), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        key, position, has_gauss, cached = state["numpy"]
        words = np.asarray(_unpacked(key), dtype=np.uint32)
        np.random.set_state(("MT19937", words, position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one.cpu(), device)
    for generator, one in zip(generators, state["generators"], strict=False):
        generator.set_state(one.cpu())


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that *loaders* and their samplers were given, each once, in order."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        owners = (loader, getattr(loader, "sampler", None), batches)
        for owner in (*owners, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())


def _packed(words: Any) -> torch.Tensor:
    """As a tensor of 32 bits a number; torch reads back no unsigned ones everywhere."""
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))  # pyright: ignore[reportUnknownMemberType] -- untyped in torch


def _unpacked(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in cast("list[int]", words.tolist())]  # pyright: ignore[reportUnknownMemberType] -- untyped in torch


def same(a: Any, b: Any) -> bool:
    """Whether two states that `read` returned are one."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        mapping = cast("dict[str, Any]", a)
        return mapping.keys() == b.keys() and all(same(v, b[k]) for k, v in mapping.items())
    if isinstance(a, (list, tuple)):
        items = cast("Sequence[Any]", a)
        return len(items) == len(b) and all(map(same, items, b))
    return bool(a == b)
