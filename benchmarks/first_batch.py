"""From `fit` to the first batch: what a person waits for who starts a small run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .method import Comparison, Sample, Sampler, Settings
from .registry import benchmark

if TYPE_CHECKING:
    from .workloads import MakeTrainer

_LIMIT = 2.0


@benchmark("first_batch", "from fit to the first batch, against plain Lightning")
def first_batch(_settings: Settings) -> Iterator[Comparison]:
    """One run of one batch a sample: `fit` alone, and with making the config and the trainer."""
    from .workloads import STARTS

    lightning, *others = STARTS
    ours = [name for name in others if name.startswith("nshtrainer")]
    for case, with_trainer in (("fit", False), ("config, trainer and fit", True)):
        yield Comparison(
            case=case,
            baseline=lightning,
            samplers={
                name: _until_first_batch(make, with_trainer=with_trainer)
                for name, make in STARTS.items()
            },
            limits={} if with_trainer else dict.fromkeys(ours, _LIMIT),
        )


def _until_first_batch(make: MakeTrainer, *, with_trainer: bool) -> Sampler:
    def sample() -> Sample:
        from .workloads import NETS, Stamps, loader, quiet

        net, shape = NETS["the demo's CNN"]
        with quiet() as folder:
            model, batches, stamps = net(), loader(shape, 1), Stamps()
            before = Sample(time.perf_counter(), time.process_time())
            trainer = make(folder, stamps)
            if not with_trainer:
                before = Sample(time.perf_counter(), time.process_time())
            trainer.fit(model, batches, batches)
        if stamps.first is None:
            raise RuntimeError("the run ended before its first batch")
        return Sample(stamps.first.wall - before.wall, stamps.first.cpu - before.cpu)

    return sample
