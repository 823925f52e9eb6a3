from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import resume_runs as runs
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

pytestmark = [
    # Lightning cannot know that ours makes it resumable.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Stateful(DataLoader[Any]):
    """A loader that resumes itself, as torchdata's does."""

    taken = 0

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        for _ in range(self.taken):
            next(iterator)
        return self._counted(iterator)

    def _counted(self, iterator: Any) -> Any:
        for batch in iterator:
            self.taken = (self.taken + 1) % len(self)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def fit(
    path: Path,
    loader: Any,
    *,
    step: int = 0,
    hook: str = "batch",
    resume: bool = False,
    callbacks: tuple[Any, ...] = (),
    **options: Any,
) -> Any:
    runs.seed(2 if resume else 1)
    saver = runs.SaveAt(path, hook, step, dies=bool(step))
    trainer: Any = pl.Trainer(callbacks=[*callbacks, saver], **{**runs.QUIET, "max_epochs": 2, **options})  # fmt: skip
    model, val = runs.Model(), DataLoader(runs.Noisy(8), batch_size=4)
    try:
        trainer.fit(model, loader, val, ckpt_path=path if resume else None)
    except runs.DeadError:
        assert step
    trainer.outcome = runs.outcome(trainer)
    return trainer


def shuffled(size: int = 24, **options: Any) -> DataLoader[Any]:
    return DataLoader(runs.Noisy(size), **{"batch_size": 4, "shuffle": True, **options})


@pytest.mark.parametrize(
    ("other", "what"),
    [({"size": 28}, "samples 24 then, 28 now"), ({"batch_size": 2}, "batch_size 4 then, 2 now")],
)
def test_other_data_is_said(tmp_path: Path, caplog: Any, other: dict[str, Any], what: str):
    """Inside an epoch, a loader of another size is no silent difference; training goes on."""
    fit(tmp_path / "x.ckpt", shuffled(), step=2)
    with caplog.at_level(logging.WARNING, "nshtrainer_checkpoint"):
        resumed = fit(tmp_path / "x.ckpt", shuffled(**other), resume=True)

    assert what in caplog.text
    assert resumed.current_epoch == 2


def test_other_data_from_the_next_epoch_on_is_no_matter(tmp_path: Path, caplog: Any):
    """At the end of an epoch there is no place to find."""
    fit(tmp_path / "x.ckpt", shuffled(), step=6, hook="epoch_end")
    with caplog.at_level(logging.WARNING, "nshtrainer_checkpoint"):
        fit(tmp_path / "x.ckpt", shuffled(size=28), resume=True)

    assert not [r for r in caplog.records if r.name.startswith("nshtrainer_checkpoint")]


def test_a_loader_that_resumes_itself_is_left_alone(tmp_path: Path):
    """Its own state says where it was; nothing is dropped besides."""
    path = tmp_path / "x.ckpt"
    straight = fit(path, Stateful(runs.Noisy(), batch_size=4))
    fit(path, Stateful(runs.Noisy(), batch_size=4), step=2)
    resumed = fit(path, Stateful(runs.Noisy(), batch_size=4), resume=True)

    seen = [t.lightning_module.seen for t in (straight, resumed)]
    assert seen[0][-len(seen[1]) :] == seen[1]
    assert runs.equal(straight.outcome, resumed.outcome)


@pytest.mark.parametrize("change", ["version", "world_size"])
def test_a_state_that_does_not_fit_is_said(tmp_path: Path, caplog: Any, change: str):
    """Another format, or another number of ranks: one warning, and the rest is resumed."""
    path = tmp_path / "x.ckpt"
    fit(path, shuffled(), step=6, hook="epoch_end")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["resume"][change] = 7
    torch.save(checkpoint, path)
    with caplog.at_level(logging.WARNING, "nshtrainer_checkpoint"):
        resumed = fit(path, shuffled(), resume=True)

    assert len([r for r in caplog.records if "7" in r.getMessage()]) == 1
    assert resumed.global_step == 12


@pytest.mark.parametrize(("hook", "step"), [("validation_end", 6), ("epoch_end", 6), ("batch", 8)])
def test_early_stopping_has_its_metric_after_a_resume(tmp_path: Path, hook: str, step: int):
    """The metrics of the save are known, so a stopper that looks at the end of the epoch finds it."""
    path = tmp_path / "x.ckpt"

    def stopper() -> EarlyStopping:
        return EarlyStopping("val/loss", patience=1, min_delta=0.5, check_on_train_epoch_end=True)

    straight = fit(path, shuffled(), callbacks=(stopper(),), max_epochs=6)
    fit(path, shuffled(), step=step, hook=hook, callbacks=(stopper(),), max_epochs=6)
    resumed = fit(path, shuffled(), resume=True, callbacks=(stopper(),), max_epochs=6)

    assert straight.current_epoch < 6, "the stopper stops"
    assert runs.equal(straight.outcome, resumed.outcome)


def test_what_is_saved_again_before_training_goes_on_is_as_it_was(tmp_path: Path):
    """A file written between loading and the first batch holds the state that was loaded."""
    path = tmp_path / "x.ckpt"

    fit(path, shuffled(), step=2)
    loaded = torch.load(path, weights_only=True)["resume"]
    again: list[Any] = []

    class Collect(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            saver = next(c for c in trainer.callbacks if isinstance(c, runs.SaveAt))
            again.append(saver.state.collect(trainer))

    fit(path, shuffled(), resume=True, callbacks=(Collect(),))

    assert runs.equal(again, [loaded])
