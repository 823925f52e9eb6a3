"""How many bytes torch holds for a piece of work, from the profiler's record of its allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Allocated", "allocated"]


class Allocated(NamedTuple):
    """Bytes of tensors in main memory, over those before."""

    left: int
    """Still held when the work was done."""
    most: int
    """Held at any moment of it."""


def allocated(work: Callable[[], object]) -> Allocated:
    """Do *work* and say what it allocated; temporary tensors and blocks that it keeps are seen."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
        gc.collect()
    del result
    profiler: Any = record.profiler
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    held = most = 0
    for _, num_bytes in sorted(events, key=lambda event: event[0]):
        held += num_bytes
        most = max(most, held)
    return Allocated(held, most)
