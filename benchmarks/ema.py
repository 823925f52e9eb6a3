"""What an EMA costs: time of an update and of a swap, and memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .method import Comparison, Sample, Sampler, Settings, filling
from .registry import benchmark

if TYPE_CHECKING:
    import torch

    from .ema_limit import Loop
    from .ema_subjects import Make, Subject
    from .ema_weights import Weights

_LIMITS = {"fp32": 1.05, "bf16": 1.3}
"""Of the bytes that must move, for the large nets."""
_AHEAD = 1 / 3
"""Of every peer, for tiny tensors."""
_SWAP = 0.02
_ONE_SHADOW = 1.02  # a megabyte or two for blocks to work in
_EXTRA = 0.02
_DECAY = 0.999


@benchmark("ema", "an EMA update against the bytes it must move, its swap and its memory")
def ema(settings: Settings) -> Iterator[Comparison]:
    """Each net in fp32 and in bf16 (with an fp32 average), on one thread and on two."""
    import torch

    from .ema_limit import limit_loop
    from .ema_peers import PEERS, load_peers
    from .ema_subjects import makers
    from .ema_weights import NETS, QUICK_NETS, Weights

    threads = torch.get_num_threads()
    peers = load_peers(install=not settings.is_quick)
    left_out = "" if peers else f" (without {', '.join(PEERS)})"
    makes = makers(peers)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    gc.collect()
    gc.freeze()  # what is imported stays; to look at it between all rounds takes longer than they do
    try:
        with limit_loop() as (limit_name, loop):
            for net, shapes in (QUICK_NETS if settings.is_quick else NETS).items():
                for dtype_name, dtype in dtypes.items():
                    case = f"{net}, {dtype_name}{left_out}"
                    weights = Weights(list(shapes()), dtype)
                    limit = _limit(loop, weights, dtype)
                    yield from _times(case, weights, makes, {limit_name: limit}, settings)
                    is_wanted = dtype_name == "bf16" if settings.is_quick else weights.is_large
                    if is_wanted:
                        yield from _memory(case, weights, makes)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _limit(loop: Loop, weights: Weights, dtype: torch.dtype) -> Callable[[], object]:
    import torch

    average = torch.randn(weights.num_elements)
    flat = average.to(dtype, copy=True)
    return lambda: loop(average, flat, 1 - _DECAY)


def _times(
    case: str,
    weights: Weights,
    makes: dict[str, Make],
    limit: dict[str, Callable[[], object]],
    settings: Settings,
) -> Iterator[Comparison]:
    import torch

    from .ema_subjects import ready

    subjects = [ready(make, weights) for make in makes.values()]
    for count in (1, 2) if (os.cpu_count() or 1) > 1 and not settings.is_quick else (1,):
        torch.set_num_threads(count)
        on = f"{case}, {count} thread{'s' if count > 1 else ''}"
        yield from _updates(on, weights, subjects, limit, settings)
        if "fp32" in case:
            yield _swaps(on, weights, subjects, settings)


def _updates(
    case: str,
    weights: Weights,
    subjects: list[Subject],
    limit: dict[str, Callable[[], object]],
    settings: Settings,
) -> Iterator[Comparison]:
    ours, *peers = subjects
    is_large = weights.is_large
    calls = limit | {subject.name: subject.update for subject in subjects}
    samplers = {name: filling(call, settings.sample_s) for name, call in calls.items()}
    bar = _LIMITS["bf16" if "bf16" in case else "fp32"]
    yield Comparison(
        case=f"{case}: an update",
        baseline=next(iter(limit)),
        samplers=samplers,
        limits={ours.name: bar} if is_large else {},
    )
    for peer in () if is_large else peers:
        yield Comparison(
            case=f"{case}: an update",
            baseline=peer.name,
            samplers={name: samplers[name] for name in (peer.name, ours.name)},
            limits={ours.name: _AHEAD},
        )


def _swaps(case: str, weights: Weights, subjects: list[Subject], settings: Settings) -> Comparison:
    from .ema_subjects import OURS, copy_swap

    copied = "three copies"
    swaps = {copied: copy_swap(weights, subjects[0].shadows)}
    swaps |= {subject.name: subject.swap for subject in subjects if subject.swap is not None}
    return Comparison(
        case=f"{case}: the average in and out again",
        baseline=copied,
        samplers={name: filling(swap, settings.sample_s) for name, swap in swaps.items()},
        limits={OURS: _SWAP} if weights.is_large else {},
    )


def _memory(case: str, weights: Weights, makes: dict[str, Make]) -> Iterator[Comparison]:
    from .ema_memory import allocated
    from .ema_subjects import OURS, ready

    held: dict[str, int] = {}
    extra: dict[str, int] = {}
    for make in makes.values():
        subjects: list[Subject] = []
        work = allocated(lambda make=make, subjects=subjects: subjects.append(ready(make, weights)))
        (subject,) = subjects
        held[subject.name] = work.left
        extra[subject.name] = max(1, allocated(subject.update).most)
    one = "one fp32 shadow"
    for what, sizes, bar in (("held", held, _ONE_SHADOW), ("extra in an update", extra, _EXTRA)):
        samplers = {one: _size(4 * weights.num_elements)}
        samplers |= {name: _size(size) for name, size in sizes.items()}
        yield Comparison(
            case=f"{case}: memory {what}",
            baseline=one,
            samplers=samplers,
            limits={OURS: bar},
            unit="B",
        )


def _size(num_bytes: int) -> Sampler:
    return lambda: Sample(float(num_bytes), 0.0)
