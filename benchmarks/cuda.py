"""On a GPU: what an EMA update costs, and a whole training step with everything on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from .method import Comparison, Sample, Sampler, Settings
from .registry import benchmark

_DECAY = 0.999
_STEPS, _QUICK_STEPS = 200, 12
_UPDATE, _DYNAMICS, _EVERYTHING, _EVERY_STEP = 1.05, 1.03, 1.05, 1.3


@benchmark("cuda", "an EMA update and a training step on a GPU, where there is one")
def cuda(settings: Settings) -> Iterator[Comparison]:
    """Fused AdamW, so that no callback has to wait for the device; metrics every 50 steps."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU: nothing is compared", file=sys.stderr)
        return
    yield from _updates(settings)
    yield _steps(settings)


def _updates(settings: Settings) -> Iterator[Comparison]:
    import torch

    from .ema_peers import PEERS, load_peers
    from .ema_subjects import OURS, makers, ready
    from .ema_weights import NETS, QUICK_NETS, Weights

    peers = load_peers(install=not settings.is_quick)
    makes = makers({name: peers[name] for name in PEERS[:2] if name in peers})
    for net, shapes in (QUICK_NETS if settings.is_quick else NETS).items():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            weights = Weights(list(shapes()), dtype).cuda()
            calls = {"one flat lerp_ in fp32": _flat(weights.num_elements)}
            calls |= {s.name: s.update for s in (ready(m, weights) for m in makes.values())}
            yield Comparison(
                case=f"GPU, {net}, {name}: an update",
                baseline=next(iter(calls)),
                samplers={who: _filling(call, settings.sample_s) for who, call in calls.items()},
                limits={OURS: _UPDATE} if weights.is_large and name == "fp32" else {},
            )
            torch.cuda.empty_cache()


def _flat(num_elements: int) -> Callable[[], object]:
    import torch

    average, weights = (torch.randn(num_elements, device="cuda") for _ in range(2))
    return lambda: average.lerp_(weights, 1 - _DECAY)


def _filling(call: Callable[[], object], seconds: float) -> Sampler:
    """A sample is the mean of the calls that fill *seconds*, the device's work included."""
    import torch

    def sample() -> Sample:
        calls, done = 1, 0
        torch.cuda.synchronize()
        cpu, start = time.process_time(), time.perf_counter()
        while True:
            for _ in range(calls):
                call()
            done += calls
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
            if wall >= seconds:
                return Sample(wall / done, (time.process_time() - cpu) / done)
            calls = done  # few waits for the device among many calls

    return sample


def _steps(settings: Settings) -> Comparison:
    from .overhead import mean_step
    from .workloads import DYNAMICS, EVERY_STEP, EVERYTHING, NETS, STEPS, on_gpu

    net = next(name for name in NETS if "deep" in name)
    steps = _QUICK_STEPS if settings.is_quick else _STEPS

    def on_device(sampler: Sampler) -> Sampler:
        def sample() -> Sample:
            with on_gpu():
                return sampler()

        return sample

    return Comparison(
        case=f"GPU, {net}: a step",
        baseline=next(iter(STEPS)),
        samplers={who: on_device(mean_step(make, net, steps)) for who, make in STEPS.items()},
        limits={DYNAMICS: _DYNAMICS, EVERYTHING: _EVERYTHING, EVERY_STEP: _EVERY_STEP},
    )
