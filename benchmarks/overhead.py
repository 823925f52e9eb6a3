"""What a training step costs beside plain Lightning: whole runs, steps inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .method import Comparison, Sample, Sampler, Settings
from .registry import benchmark

__all__ = ["mean_step"]

if TYPE_CHECKING:
    from .workloads import MakeTrainer

_STEPS, _QUICK_STEPS = 250, 12
_DYNAMICS, _EVERYTHING, _EVERY_STEP = 1.03, 1.05, 1.3
_FIRST = 0.2  # of the steps: the optimizer's state and every callback's are made in these


@benchmark("overhead", "a whole training step with our callbacks, against plain Lightning")
def overhead(settings: Settings) -> Iterator[Comparison]:
    """One epoch a sample, on one thread; batch 64, AdamW, metrics logged every 50 steps."""
    import torch

    from .workloads import DYNAMICS, EVERY_STEP, EVERYTHING, NETS, STEPS, TRAINERS

    limits = {DYNAMICS: _DYNAMICS, EVERYTHING: _EVERYTHING, EVERY_STEP: _EVERY_STEP}

    threads, steps = torch.get_num_threads(), _QUICK_STEPS if settings.is_quick else _STEPS
    torch.set_num_threads(1)
    try:
        for net in NETS:
            trainers = STEPS if "deep" in net else TRAINERS
            yield Comparison(
                case=f"{net}: a step",
                baseline=next(iter(trainers)),
                samplers={name: mean_step(make, net, steps) for name, make in trainers.items()},
                limits=limits if "deep" in net else {},
            )
    finally:
        torch.set_num_threads(threads)


def mean_step(make: MakeTrainer, net: str, steps: int) -> Sampler:
    """Whole runs of *steps* steps; a sample is the mean step of one, without its first fifth."""

    def sample() -> Sample:
        from lightning import seed_everything

        from .workloads import NETS, Stamps, loader, quiet

        make_net, shape = NETS[net]
        seed_everything(0, verbose=False)
        with quiet() as folder:
            stamps = Stamps()
            trainer = make(folder, stamps)
            trainer.fit(make_net(), loader(shape, steps), loader(shape, 1))
        if trainer.global_step != steps or len(stamps.ends) != steps:
            raise RuntimeError(f"{trainer.global_step} of {steps} steps were taken")
        start, end = int(_FIRST * steps), steps - 1
        first, last = stamps.ends[start], stamps.ends[end]
        return Sample(
            (last.wall - first.wall) / (end - start), (last.cpu - first.cpu) / (end - start)
        )

    return sample
