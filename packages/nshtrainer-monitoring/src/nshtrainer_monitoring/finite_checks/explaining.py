"""Says more about the first finding of a run: the module that produced it, and a file with its batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from nshtrainer.runtime.gradients import GradientStep

from .acting import Finding
from .batches import MicroBatch
from .config import FiniteChecksCallbackConfig
from .rng import RandomState

if TYPE_CHECKING:
    from nshtrainer.run.run import Run

__all__ = ["Explainer"]

log = logging.getLogger(__name__)


class Explainer:
    """Keeps the batches of the present optimizer step, and explains one finding with them.

    Args:
        config: What to explain, and where to write.
        run: The run whose folder takes dumps; None takes the trainer's root directory.
    """

    def __init__(self, config: FiniteChecksCallbackConfig, run: Run | None) -> None:
        self._config = config
        self._run = run
        self._batches: list[MicroBatch] = []
        self._has_stepped = self._is_done = False

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on the run's folder over all ranks; warn of what will not work."""
        if self._config.dump and self._config.dump_dir is None and self._run is not None:
            self._run.settle(trainer)
        if self._config.find_module:
            from .rerun import obstacle_to

            obstacle = obstacle_to(trainer, pl_module)
            if obstacle is not None and trainer.is_global_zero:
                log.warning(
                    "finite_checks.find_module will find nothing: %s. Use `dump` and look at the "
                    "batch yourself, or switch the option off.",
                    obstacle,
                )

    def keep(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Keep a batch that is about to be trained on, until the step that it belongs to is over."""
        if self._has_stepped:
            self._batches, self._has_stepped = [], False
        random = RandomState.take(trainer.strategy.root_device)
        self._batches.append(MicroBatch(batch, batch_idx, random, trainer.global_step))

    def end_step(self) -> None:
        """Let the next batch be the first one of a step."""
        self._has_stepped = True

    def explain(self, step: GradientStep, found: Sequence[Finding]) -> str:
        """Return sentences, each after a blank, about *found*; once in a run, since it is expensive."""
        if self._is_done:
            return ""
        self._is_done = True
        origin, text = None, ""
        if self._config.find_module:
            from .rerun import find_origin

            origin = find_origin(step.trainer, step.pl_module, self._batches)
            text += f" {origin.text}"
        if self._config.dump:
            from .dump import write_dump

            try:
                path = write_dump(
                    self._folder(step.trainer),
                    self._config.label,
                    step=step.step,
                    rank=step.trainer.global_rank,
                    findings=found,
                    origin=origin,
                    batches=self._batches,
                )
            except OSError as error:  # a full disk must not hide the finding
                log.warning("the batches of step %d could not be written: %s", step.step, error)
            else:
                text += f" Batches, names and random states are in {path}."
        return text

    def _folder(self, trainer: Trainer) -> Path:
        if (chosen := self._config.dump_dir) is not None:
            return chosen.expanduser()
        if self._run is not None:
            return self._run.directory.ensure("finite_checks")
        return Path(trainer.default_root_dir) / "finite_checks"
