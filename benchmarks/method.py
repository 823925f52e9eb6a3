"""How two things are compared: interleaved rounds, the median of their ratios, and a spread.

All competitors take turns in one process (A B C, then B C A, ...), so that what drifts on the
machine drifts for all of them. A sample is the mean of the calls that fill 50 ms, one whole run, or a
turn of a training that goes on in another process.
The value is the median of the per-round ratios; the spread is half the interquartile range over that
median. A spread above 20 % is no verdict: it is measured again, at most three times in all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = [
    "MAX_SPREAD",
    "Comparison",
    "Ratio",
    "Sample",
    "Sampler",
    "Settings",
    "compare",
    "filling",
    "mean_of",
    "ratio_of",
    "take_rounds",
]

MAX_SPREAD = 0.20
"""A ratio that spreads more than this says nothing."""


class Sample(NamedTuple):
    """Seconds that one unit of work took: a call, a step or a whole run."""

    wall: float
    cpu: float
    """Of all threads of the process that did the work."""


Sampler = Callable[[], Sample]
"""Takes one sample."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds: Samples of each competitor that count.
        warmups: Samples of each that are thrown away before.
        sample_s: Seconds that the calls of one sample fill.
        attempts: How often a comparison is made at most, until no ratio spreads too much.
        is_quick: Whether this is only a check that the benchmarks run; nothing is judged then.
    """

    rounds: int = 9
    warmups: int = 2
    sample_s: float = 0.05
    attempts: int = 3
    is_quick: bool = False

    @classmethod
    def quick(cls) -> Settings:
        """Few short rounds: enough to see that a benchmark runs, not for a verdict."""
        return cls(rounds=2, warmups=0, sample_s=0.002, attempts=1, is_quick=True)


@dataclass(frozen=True)
class Comparison:
    """Competitors that are measured in turn.

    Attributes:
        case: What they all do.
        baseline: The competitor that the others are divided by.
        samplers: Competitor -> how it is measured; the baseline is one of them.
        limits: Competitor -> the ratio it must not exceed; those without one are only reported.
        unit: Of the samples: seconds, or bytes of memory in their place.
        turns: How often each competitor has its turn in a round, for a sample that is their mean.
        times_rounds: How many times as many rounds are taken.
    """

    case: str
    baseline: str
    samplers: Mapping[str, Sampler]
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    unit: Literal["s", "B"] = "s"
    turns: int = 1
    times_rounds: int = 1


@dataclass(frozen=True)
class Ratio:
    """One competitor over the baseline.

    Attributes:
        value: Median of the per-round ratios of wall time.
        spread: Half the interquartile range of those ratios, over their median.
        cpu: The same median for CPU time; None where the clock was too coarse.
        best: The fastest sample over the fastest one of the baseline.
        seconds: Median wall time of the competitor, for orientation.
        attempt: Which attempt this is from, counted from 1.
    """

    value: float
    spread: float
    cpu: float | None
    best: float
    seconds: float
    attempt: int = 1

    @property
    def is_steady(self) -> bool:
        """Whether the rounds agree well enough for a verdict."""
        return self.spread <= MAX_SPREAD


def filling(
    call: Callable[[], object], seconds: float, *, clock: Callable[[], float] = time.perf_counter
) -> Sampler:
    """A sampler whose samples are the mean over as many calls as fill *seconds*.

    The number of calls is found anew for each sample, since a machine that got slower needs fewer;
    the clock is read rarely enough to cost nothing even where a call takes a microsecond.
    """
    batch = 1

    def sample() -> Sample:
        nonlocal batch
        calls = 0
        cpu, start = time.process_time(), clock()
        while True:
            for _ in range(batch):
                call()
            calls += batch
            wall = clock() - start
            if wall >= seconds:
                break
        cpu = time.process_time() - cpu
        batch = max(1, calls // 16)
        return Sample(wall / calls, cpu / calls)

    return sample


def take_rounds(
    samplers: Mapping[str, Sampler], *, rounds: int, warmups: int, turns: int = 1
) -> dict[str, list[Sample]]:
    """Samples of each competitor, one a round, after *warmups* rounds that are thrown away.

    Each round, and each turn of one, starts with the next competitor; garbage is collected between
    rounds, never in one.
    """
    names = list(samplers)
    taken: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(warmups + rounds):
        found: dict[str, list[Sample]] = {name: [] for name in names}
        with _no_collection():
            for turn in range(number, number + turns):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    found[name].append(samplers[name]())
        if number >= warmups:
            for name in names:
                taken[name].append(mean_of(found[name]))
    return taken


def mean_of(samples: list[Sample]) -> Sample:
    """The mean of wall and of CPU time."""
    count = len(samples)
    return Sample(sum(s.wall for s in samples) / count, sum(s.cpu for s in samples) / count)


@contextmanager
def _no_collection() -> Generator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def ratio_of(samples: list[Sample], baseline: list[Sample], attempt: int = 1) -> Ratio:
    """*samples* over *baseline*, round by round.

    Raises:
        ValueError: There are fewer than two rounds, or not as many of each.
    """
    wall = [a.wall / b.wall for a, b in zip(samples, baseline, strict=True)]
    if len(wall) < 2:
        raise ValueError(f"{len(wall)} rounds have no spread; take at least 2")
    low, value, high = statistics.quantiles(wall, n=4, method="inclusive")
    return Ratio(
        value=value,
        spread=(high - low) / 2 / value,
        cpu=_median_cpu(samples, baseline),
        best=min(s.wall for s in samples) / min(s.wall for s in baseline),
        seconds=statistics.median(s.wall for s in samples),
        attempt=attempt,
    )


def _median_cpu(samples: list[Sample], baseline: list[Sample]) -> float | None:
    if not all(b.cpu > 0 for b in baseline):
        return None
    return statistics.median(a.cpu / b.cpu for a, b in zip(samples, baseline, strict=True))


def compare(comparison: Comparison, settings: Settings) -> dict[str, Ratio]:
    """Competitor -> its ratio to the baseline, for all but the baseline itself.

    The first steady attempt of a competitor counts; without one, the last attempt.
    """
    found: dict[str, Ratio] = {}
    for attempt in range(1, settings.attempts + 1):
        rounds = settings.rounds if settings.is_quick else settings.rounds * comparison.times_rounds
        turns = 1 if settings.is_quick else comparison.turns
        taken = take_rounds(
            comparison.samplers, rounds=rounds, warmups=settings.warmups, turns=turns
        )
        baseline = taken.pop(comparison.baseline)
        for name, samples in taken.items():
            if name not in found or not found[name].is_steady:
                found[name] = ratio_of(samples, baseline, attempt)
        if all(ratio.is_steady for ratio in found.values()):
            break
    return found
