"""Whatever hook an exception comes from, the emergency checkpoint resumes to the uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from resume_runs import QUIET, DeadError, Model, Noisy, equal, outcome, seed
from torch.utils.data import DataLoader

from nshtrainer_checkpoint import (
    BestCheckpointCallback,
    LastCheckpointCallback,
    OnExceptionCheckpointCallback,
)

pytestmark = [
    # A shuffled validation is what must not disturb the order of training.
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
    # Lightning cannot know that ours makes it resumable.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

METRIC = {"monitor": "val/loss", "mode": "min"}


class Die(Callback):
    """Raises in a hook, when *step* optimizer steps are done."""

    def __init__(self, hook: str, step: int) -> None:
        def die(trainer: Any, *args: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                raise DeadError

        setattr(self, hook, die)


def fit(
    folder: Path, number: int, *more: Callback, alone: bool, path: str | None = None
) -> Trainer:
    seed(number)
    callbacks: list[Callback] = [OnExceptionCheckpointCallback(dirpath=folder)]
    if not alone:
        best = BestCheckpointCallback(metric=METRIC, dirpath=folder)
        callbacks = [best, LastCheckpointCallback(dirpath=folder), *callbacks]
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[*more, *callbacks])
    train = DataLoader(Noisy(), batch_size=4, shuffle=True)
    val = DataLoader(Noisy(8), batch_size=4, shuffle=True)
    trainer.fit(Model(plateau=True, acts_late=True), train, val, ckpt_path=path)
    return trainer


@pytest.mark.parametrize("alone", [False, True], ids=["beside others", "alone"])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 8),
        ("on_before_optimizer_step", 8),
        ("on_validation_start", 6),
        ("on_validation_batch_end", 12),
    ],
)
def test_an_exception_in_a_hook_costs_nothing(tmp_path: Path, hook: str, step: int, alone: bool):
    """Weights, optimizer, plateau schedule, samples in their order, and the next random numbers."""
    straight = fit(tmp_path / "straight", 1, alone=alone)
    expected = outcome(straight)
    with pytest.raises(DeadError):
        fit(tmp_path / "dead", 1, Die(hook, step), alone=alone)
    (saved,) = (tmp_path / "dead" / "on_exception").glob("*.ckpt")

    resumed = fit(tmp_path / "dead", 2, alone=alone, path=str(saved))

    seen: list[Any] = resumed.lightning_module.seen
    assert seen
    assert seen == straight.lightning_module.seen[-len(seen) :]
    result = outcome(resumed)
    for part, value in expected.items():
        assert equal(value, result[part]), part
