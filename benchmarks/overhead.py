"""What a training step costs beside plain Lightning: whole runs, steps inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .method import Comparison, Sample, Sampler, Settings, mean_of
from .registry import benchmark
from .turns import StepTimes, taking_turns

__all__ = ["mean_step"]

if TYPE_CHECKING:
    from .workloads import MakeTrainer

_FIRST_TURN, _QUICK_FIRST_TURN, _TURN, _COPIES = 50, 12, 5, 2
_TURNS_OF_A_COPY, _TIMES_ROUNDS = 10, 2
"""A round is 50 steps of each process, one of which is logged."""
_WANDB_COPIES = 4  # for a bar that is as low as what two processes differ by
_DYNAMICS, _EVERYTHING, _EVERY_STEP, _WANDB = 1.03, 1.05, 1.3, 1.02
_FIRST = 0.2  # of the steps: the optimizer's state and every callback's are made in these


@benchmark("overhead", "a whole training step with our callbacks, against plain Lightning")
def overhead(settings: Settings) -> Iterator[Comparison]:
    """Turns of 5 steps, each trainer in processes of its own; one thread, batch 64, AdamW."""
    from .workloads import (
        DYNAMICS,
        EVERY_STEP,
        EVERYTHING,
        NETS,
        STEPS,
        STEPS_TO_RECORD,
        TRAINERS,
        WANDB,
        WITH_WANDB,
    )  # fmt: skip

    limits = {DYNAMICS: _DYNAMICS, EVERYTHING: _EVERYTHING, EVERY_STEP: _EVERY_STEP}
    first, copies = (_QUICK_FIRST_TURN, 1) if settings.is_quick else (_FIRST_TURN, _COPIES)
    turns: dict[str, int] = {"first": first, "steps": _TURN, "copies": copies}
    wandb_copies = 1 if settings.is_quick else _WANDB_COPIES
    with_wandb = {**turns, "first": STEPS_TO_RECORD, "copies": wandb_copies}
    for net in NETS:
        trainers = STEPS if "deep" in net else TRAINERS
        with taking_turns(trainers, net, **turns) as samplers:
            yield Comparison(
                case=f"{net}: a step",
                baseline=next(iter(trainers)),
                samplers=samplers,
                limits=limits if "deep" in net else {},
                turns=copies * _TURNS_OF_A_COPY,
                times_rounds=_TIMES_ROUNDS,
            )
        if settings.is_quick and "deep" in net:
            continue  # seen to run on the other net; each run of W&B takes seconds
        with taking_turns(WITH_WANDB, net, **with_wandb, weigh=_with_record) as samplers:
            yield Comparison(
                case=f"{net}: a step, with W&B",
                baseline=next(iter(WITH_WANDB)),
                samplers=samplers,
                limits={WANDB: _WANDB},
                turns=wandb_copies * _TURNS_OF_A_COPY,
                times_rounds=_TIMES_ROUNDS,
            )


def _with_record(first: StepTimes, turn: StepTimes) -> Sample:
    """The mean step where one in 1000 makes a record: that of the first turn weighs as much."""
    from .workloads import STEPS_TO_RECORD, WATCH_EVERY

    # The times begin with the second step.
    record, usual = first[STEPS_TO_RECORD - 2], mean_of(first[STEPS_TO_RECORD // 2 : -1])
    mean, share = mean_of(turn), 1 / WATCH_EVERY
    return Sample(
        mean.wall + (record.wall - usual.wall) * share, mean.cpu + (record.cpu - usual.cpu) * share
    )


def mean_step(make: MakeTrainer, net: str, steps: int) -> Sampler:
    """Whole runs of *steps* steps in this process; a sample is the mean step without the first fifth."""

    def sample() -> Sample:
        ends = _ends_of_steps(make, net, steps)
        first, last = ends[int(_FIRST * steps)], ends[-1]
        count = len(ends) - 1 - int(_FIRST * steps)
        return Sample((last.wall - first.wall) / count, (last.cpu - first.cpu) / count)

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
