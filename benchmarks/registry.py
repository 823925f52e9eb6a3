"""The benchmarks by name; each module of this package that has one registers it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .method import Comparison, Settings, compare
from .rows import Row, row_of

__all__ = ["Benchmark", "all_benchmarks", "benchmark"]

_MODULES = (
    "import_time",
    "validation",
    "discovery",
    "resolve",
    "first_batch",
    "overhead",
    "checkpoint",
    "ema",
    "cuda",
    "norms",
)

Comparisons = Callable[[Settings], Iterator[Comparison]]


@dataclass(frozen=True)
class Benchmark:
    """A named series of comparisons.

    Attributes:
        name: What the command line calls it.
        about: What it measures, in one line.
        comparisons: Makes them one after the other; what a comparison needs (a folder, a process)
            may live until the next one is asked for.
    """

    name: str
    about: str
    comparisons: Comparisons

    def run(self, settings: Settings) -> Iterator[Row]:
        """Measure, and yield each row when it is known."""
        for comparison in self.comparisons(settings):
            for subject, ratio in compare(comparison, settings).items():
                yield row_of(self.name, comparison, subject, ratio, settings)


_benchmarks: dict[str, Benchmark] = {}


def benchmark(name: str, about: str) -> Callable[[Comparisons], Comparisons]:
    """Register a generator of comparisons as the benchmark *name*."""

    def register(comparisons: Comparisons) -> Comparisons:
        _benchmarks[name] = Benchmark(name, about, comparisons)
        return comparisons

    return register


def all_benchmarks() -> dict[str, Benchmark]:
    """Name -> benchmark, in the order in which they are run."""
    for module in _MODULES:
        importlib.import_module(f".{module}", __package__)
    return dict(_benchmarks)
