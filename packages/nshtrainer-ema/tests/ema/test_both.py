"""Validation with both sets of weights in one fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from nshtrainer_ema import EMACallback


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    return {"model": make_model, "trainer": make_trainer, "loader": make_loader}


def fit(make: Any, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    model = make["model"]()
    trainer = make["trainer"](*callbacks, **{"max_epochs": 2, **options})
    trainer.fit(model, make["loader"](4), make["loader"](1))
    return model, trainer


@pytest.mark.parametrize("original", [False, True])
def test_both_sets_are_validated_and_logged_under_two_prefixes(original, make):
    """The plain name stays that of the evaluated set, which is validated last."""
    ema = EMACallback(decay=0.8, validate_both=True, validate_original_weights=original)
    model, trainer = fit(make, ema)
    trained, averaged = (model.probe[1::2], model.probe[::2]) if original else (
        model.probe[::2], model.probe[1::2],
    )  # fmt: skip
    metrics = trainer.callback_metrics

    assert len(model.probe) == 4
    assert torch.equal(trained[1], model.trained[-1][2])
    assert torch.equal(averaged[1], ema.average["second.weight"])
    assert metrics["raw/val/loss"] != metrics["ema/val/loss"]
    assert metrics["val/loss"] == metrics["raw/val/loss" if original else "ema/val/loss"]


def test_each_result_is_what_it_would_be_alone(make):
    """To the last digit, and training is the same as without."""
    _, both = fit(make, EMACallback(decay=0.8, validate_both=True))
    model, averaged = fit(make, EMACallback(decay=0.8))
    same, raw = fit(make, EMACallback(decay=0.8, validate_original_weights=True))

    assert both.callback_metrics["ema/val/loss"] == averaged.callback_metrics["val/loss"]
    assert both.callback_metrics["raw/val/loss"] == raw.callback_metrics["val/loss"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_random_numbers_of_the_first_are_not_missed_afterwards(make):
    """A validation that draws some draws the same in both, and training goes on as with one."""

    class Draws(make["model"]):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.drawn = [*getattr(self, "drawn", []), float(torch.rand(()))]
            super().validation_step(batch, batch_idx)

    drawn = []
    for both in (False, True):
        model = Draws()
        trainer = make["trainer"](EMACallback(decay=0.8, validate_both=both), max_epochs=2)
        trainer.fit(model, make["loader"](4), make["loader"](1))
        drawn.append(model.drawn)

    assert drawn[1] == [drawn[0][0]] * 2 + [drawn[0][1]] * 2


def test_loggers_get_both_at_the_same_step(make, tmp_path):
    """Beside the plain name."""
    logger = CSVLogger(tmp_path, name="", version="")
    fit(make, EMACallback(decay=0.8, validate_both=True), logger=logger)
    logger.save()
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()

    names = header.split(",")
    for name in ("val/loss", "ema/val/loss", "raw/val/loss"):
        column = names.index(name)
        assert len([row for row in rows if row.split(",")[column]]) == 2


def test_a_checkpoint_can_wait_for_either(make, tmp_path):
    """The second results are there before checkpoints are decided."""
    saver = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="raw/val/loss", save_on_train_epoch_end=False
    )
    fit(make, EMACallback(decay=0.8, validate_both=True), saver, enable_checkpointing=True)

    assert saver.best_model_score is not None


@pytest.mark.parametrize("original", [False, True])
def test_an_exception_in_the_unseen_validation_leaves_everything_as_it_was(original, make):
    """Weights, callbacks, loggers, and the loop."""

    class Fails(make["model"]):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("in evaluation")

    ema = EMACallback(decay=0.8, validate_both=True, validate_original_weights=original)
    model, trainer = Fails(), make["trainer"](ema)
    callbacks = list(trainer.callbacks)
    with pytest.raises(RuntimeError, match="in evaluation"):
        trainer.fit(model, make["loader"](4), make["loader"](1))

    assert all(
        torch.equal(p, t) for p, t in zip(model.parameters(), model.trained[-1], strict=True)
    )
    assert trainer.callbacks == callbacks
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
