"""Trainings that go on side by side, in processes of their own, and take turns of a few steps each.

What drifts on a machine within a second drifts for all of them, and none leaves memory, caches or
garbage behind for the next. How fast a process is depends a little on where its memory happens to
lie, so each trainer has several.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from .method import Sample, Sampler, mean_of

if TYPE_CHECKING:
    from .workloads import MakeTrainer

__all__ = ["StepTimes", "taking_turns"]

_ANSWER_S = 300
_ENDLESS = 1 << 30

StepTimes = list[Sample]
"""What each step of one turn took."""

Weigh = Callable[[StepTimes, StepTimes], Sample]


@contextlib.contextmanager
def taking_turns(
    trainers: Mapping[str, MakeTrainer],
    net: str,
    *,
    first: int,
    steps: int,
    copies: int,
    weigh: Weigh | None = None,
) -> Generator[dict[str, Sampler]]:
    """Start to train *net* with each of *trainers*; all stand still unless it is their turn.

    Args:
        trainers: Functions at the top of a module, since other processes call them.
        net: One of `workloads.NETS`.
        first: Steps of the first turn of each process, which is no sample.
        steps: Of the other turns; a sample is one turn of one process.
        copies: Processes of each trainer; they are asked one after the other.
        weigh: Makes a sample of a turn; gets the steps of the process's first turn beside it. None takes
            the mean step of the turn.

    Yields:
        Trainer -> its sampler. All processes end with the block.

    Raises:
        RuntimeError: A training ended, or made no turn in 300 s.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["benchmarks.workloads"])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started: dict[str, list[_Training]] = {name: [] for name in trainers}
        for number, (_, name) in enumerate(itertools.product(range(copies), trainers)):
            training = _Training(context, trainers[name], net, folder / str(number), (first, steps))
            stack.callback(training.end)
            started[name].append(training)
        yield {name: _sampler(copies, weigh) for name, copies in started.items()}


def _sampler(copies: list[_Training], weigh: Weigh | None) -> Sampler:
    turns = itertools.cycle(copies)

    def sample() -> Sample:
        training = next(turns)
        turn = training.turn()
        return mean_of(turn) if weigh is None else weigh(training.first, turn)

    return sample


class _Training:
    """A process that trains, and stands still before each turn."""

    def __init__(
        self,
        context: BaseContext,
        make: MakeTrainer,
        net: str,
        folder: Path,
        steps: tuple[int, int],
    ) -> None:
        folder.mkdir()
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = cast("Any", context).Process(
            target=_train, args=(make, net, folder, steps, theirs), daemon=False
        )
        self._process.start()
        theirs.close()
        self.first = self._answer()

    def turn(self) -> StepTimes:
        """Let it make its next steps."""
        self._connection.send(None)
        return self._answer()

    def end(self) -> None:
        """Kill it: what a run leaves behind is no subject here."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _answer(self) -> StepTimes:
        try:
            if self._connection.poll(_ANSWER_S):
                return self._connection.recv()
        except EOFError:
            pass
        raise RuntimeError("a training ended or stands still; its output says more")


def _train(
    make: MakeTrainer, net: str, folder: Path, steps: tuple[int, int], connection: Connection
) -> None:
    """Train until killed; the first turn, and those that follow for each message, have *steps* steps."""
    import torch
    from lightning import seed_everything

    from .workloads import NETS, Stamps, loader, quiet

    class Turns(Stamps):
        wanted = steps[0]

        @override
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(*args, **kwargs)
            if len(self.ends) > self.wanted:
                self.wanted = steps[1]
                stamps, self.ends = self.ends, []
                connection.send([_between(a, b) for a, b in itertools.pairwise(stamps)])
                connection.recv()
                super().on_train_batch_end()

    torch.set_num_threads(1)
    tempfile.tempdir = os.fspath(folder)  # what is killed takes nothing away
    make_net, shape = NETS[net]
    seed_everything(0, verbose=False)
    with quiet():
        trainer = make(folder, Turns())
        trainer.fit(make_net(), loader(shape, _ENDLESS), loader(shape, 1))


def _between(start: Sample, end: Sample) -> Sample:
    return Sample(end.wall - start.wall, end.cpu - start.cpu)
