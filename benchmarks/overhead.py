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
_DYNAMICS, _EVERYTHING, _EVERY_STEP, _WANDB = 1.03, 1.05, 1.3, 1.02
_FIRST = 0.2  # of the steps: the optimizer's state and every callback's are made in these


@benchmark("overhead", "a whole training step with our callbacks, against plain Lightning")
def overhead(settings: Settings) -> Iterator[Comparison]:
    """One epoch a sample, on one thread; batch 64, AdamW, metrics logged every 50 steps."""
    import torch

    from .workloads import (
        DYNAMICS,
        EVERY_STEP,
        EVERYTHING,
        NETS,
        STEPS,
        TRAINERS,
        WANDB,
        WITH_WANDB,
    )  # fmt: skip

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
            if settings.is_quick and "deep" in net:
                continue  # seen to run on the other net; each run of W&B takes seconds
            yield Comparison(
                case=f"{net}: a step, with W&B",
                baseline=next(iter(WITH_WANDB)),
                samplers={n: _watched_step(make, net, steps) for n, make in WITH_WANDB.items()},
                limits={WANDB: _WANDB},
            )
    finally:
        torch.set_num_threads(threads)


def mean_step(make: MakeTrainer, net: str, steps: int) -> Sampler:
    """Whole runs of *steps* steps; a sample is the mean step of one, without its first fifth."""

    def sample() -> Sample:
        ends = _ends_of_steps(make, net, steps)
        return _mean(ends[int(_FIRST * steps)], ends[-1], len(ends) - 1 - int(_FIRST * steps))

    return sample


def _watched_step(make: MakeTrainer, net: str, steps: int) -> Sampler:
    """The mean step where one in 1000 makes a record: that one is measured, and weighs as much.

    Steps on which W&B writes what it was given come after it, and weigh like all others.
    """

    def sample() -> Sample:
        from .workloads import STEPS_TO_RECORD, WATCH_EVERY

        ends = _ends_of_steps(make, net, steps)
        before, record = ends[STEPS_TO_RECORD - 2], ends[STEPS_TO_RECORD - 1]
        usual = _mean(record, ends[-1], steps - STEPS_TO_RECORD)
        extra = _mean(before, record, 1)
        share = 1 / WATCH_EVERY
        return Sample(
            usual.wall + (extra.wall - usual.wall) * share,
            usual.cpu + (extra.cpu - usual.cpu) * share,
        )

    return sample


def _ends_of_steps(make: MakeTrainer, net: str, steps: int) -> list[Sample]:
    """Train for *steps* steps; the clocks at the end of each."""
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
    return stamps.ends


def _mean(first: Sample, last: Sample, steps: int) -> Sample:
    return Sample((last.wall - first.wall) / steps, (last.cpu - first.cpu) / steps)
