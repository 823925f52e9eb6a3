"""What our callbacks save is enough for a resumed run to be the uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

METRIC = {"monitor": "val/loss", "mode": "min"}


class DieAfter(Callback):
    """Raises after *step* optimizer steps, in the middle of an epoch, when all else has run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise DeadError


def _fit(folder: Path, number: int, *more: Callback, resume: bool = False, **options: Any) -> Any:
    seed(number)
    last = LastCheckpointCallback(dirpath=folder / "last", topk=3, every_n_steps=2, **options)
    best = BestCheckpointCallback(metric=METRIC, dirpath=folder / "best")
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[last, best, *more])
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    val = DataLoader(Noisy(8), batch_size=4, shuffle=True)
    model = Model(acts_late=True)
    trainer.fit(model, loader, val, ckpt_path="last" if resume else None)
    return trainer


@pytest.mark.parametrize("options", [{}, {"async_save": True}], ids=["sync", "async"])
@pytest.mark.parametrize("step", [5, 6, 11, 13])
def test_dying_anywhere_and_resuming_from_last_changes_nothing(
    tmp_path: Path, step: int, options: dict[str, Any]
):
    """Weights, optimizer, schedule, samples seen and the next random number are the same."""
    straight = _fit(tmp_path / "straight", 1, **options)
    expected = outcome(straight)
    with pytest.raises(DeadError):
        _fit(tmp_path / "killed", 1, DieAfter(step), **options)

    resumed = _fit(tmp_path / "killed", 2, resume=True, **options)

    result = outcome(resumed)
    seen = resumed.lightning_module.seen
    assert seen
    assert seen == straight.lightning_module.seen[-len(seen) :]
    for part, value in expected.items():
        assert equal(value, result[part]), part


def test_saving_draws_no_random_number_and_changes_no_training(tmp_path: Path):
    """With and without our callbacks the same weights come out."""
    with_ours = outcome(_fit(tmp_path, 1))
    seed(1)
    without = Trainer(**QUIET, max_epochs=3, enable_checkpointing=False)
    without.fit(
        Model(acts_late=True),
        DataLoader(Noisy(), batch_size=4, shuffle=True),
        DataLoader(Noisy(8), batch_size=4, shuffle=True),
    )

    for part, value in outcome(without).items():
        assert equal(value, with_ours[part]), part


def test_the_file_stays_readable_without_trust(tmp_path: Path):
    """The added state is plain data: torch reads it with `weights_only=True`."""
    trainer = _fit(tmp_path, 1)

    loaded = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert loaded["nshtrainer_resume"]["world_size"] == 1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_checkpoint_of_lightnings_own_resumes_as_it_does_with_lightning(tmp_path: Path):
    """A file without our state is taken as it is."""
    trainer = _fit(tmp_path, 1)
    path = tmp_path / "plain.ckpt"
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    del checkpoint["nshtrainer_resume"]
    torch.save(checkpoint, path)

    again = Trainer(**QUIET, max_epochs=4, callbacks=[LastCheckpointCallback(dirpath=tmp_path)])
    again.fit(Model(), DataLoader(Noisy(), 4), DataLoader(Noisy(8), 4), ckpt_path=path)
    assert again.current_epoch == 4


class DieInside(Model):
    """Raises in the training step that follows *step* optimizer steps, after its random numbers."""

    def __init__(self, step: int) -> None:
        super().__init__(acts_late=True)
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.step:
            raise DeadError
        return loss


@pytest.mark.parametrize("others", [True, False], ids=["beside last", "alone"])
@pytest.mark.parametrize("step", [5, 13])
def test_an_emergency_checkpoint_is_as_exact(tmp_path: Path, step: int, others: bool):
    """Saved in the middle of a step that failed; that step is made anew, with its own batch."""

    def fit(model: Model, number: int, folder: Path, path: str | None = None) -> Any:
        seed(number)
        callbacks: list[Callback] = [OnExceptionCheckpointCallback(dirpath=folder)]
        if others:
            callbacks.insert(0, LastCheckpointCallback(dirpath=folder))
        trainer = Trainer(**QUIET, max_epochs=3, callbacks=callbacks)
        trainer.fit(model, DataLoader(Noisy(), batch_size=4, shuffle=True), ckpt_path=path)
        return trainer

    expected = outcome(fit(Model(acts_late=True), 1, tmp_path / "straight"))
    with pytest.raises(DeadError):
        fit(DieInside(step), 1, tmp_path / "dead")
    (saved,) = (tmp_path / "dead" / "on_exception").glob("*.ckpt")

    result = outcome(fit(Model(acts_late=True), 2, tmp_path / "again", str(saved)))
    for part, value in expected.items():
        assert equal(value, result[part]), part
