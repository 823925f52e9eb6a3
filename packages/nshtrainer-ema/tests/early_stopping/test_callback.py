"""Early stopping: when it ends training, what it says, and what a resumed run does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from pydantic import ValidationError

from nshtrainer import MetricConfig, create_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer_ema import EarlyStoppingCallback, EarlyStoppingCallbackConfig
from nshtrainer_ema.early_stopping.callback import MissingMetricError
from nshtrainer_ema.early_stopping.learning_rate import LearningRateFloor

VAL = MetricConfig(name="val/metric", mode="min")


class Scripted(Callback):
    """Logs given values: after validation `n`, at the end of training epoch `n`, or at both."""

    def __init__(self, values: list[float], *, where: str = "validation") -> None:
        self.values, self.where, self.checks = values, where, 0

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.where != "training" and not trainer.sanity_checking:
            pl_module.log("val/metric", float(self.values[trainer.current_epoch]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.where != "validation":
            pl_module.log("val/metric", float(self.values[trainer.current_epoch]))


def epochs_run(
    stopper: EarlyStoppingCallback, values: list[float], make: Any, **options: Any
) -> int:
    model = options.pop("model", None) or make["model"]()
    trainer = make["trainer"](
        stopper,
        Scripted(values, where=options.pop("where", "validation")),
        max_epochs=len(values),
        **options,
    )
    trainer.fit(model, make["loader"](2), make["loader"](1))
    return trainer.current_epoch


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    return {"model": make_model, "trainer": make_trainer, "loader": make_loader}


@pytest.mark.parametrize("where", ["validation", "training"])
@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([3, 2, 1, 0.5, 0.2], {"patience": 1}, 5),
        ([3, 4, 5, 6, 7], {"patience": 2}, 3),
        ([3, 4, 2, 5, 6], {"patience": 2}, 5),
        ([3, 2.95, 2.9, 2.85, 1], {"patience": 2, "min_delta": 0.5}, 3),
        ([9, 9, 9, 9, 9], {"patience": 1, "skip_first_n_epochs": 2}, 4),
        ([3, 2, 1, 0, 0], {"patience": 9, "stopping_threshold": 1.5}, 3),
        ([3, 8, 1, 0, 0], {"patience": 9, "divergence_threshold": 7.0}, 2),
        ([3, float("nan"), 1, 0, 0], {"patience": 9}, 2),
        ([3, float("nan"), 1, 0.5, 0], {"patience": 9, "check_finite": False}, 5),
    ],
)
def test_training_ends_after_the_check_that_says_so(values, options, epochs, where, make):
    """Patience, min_delta, thresholds, NaN and the skipped epochs decide, wherever it is logged."""
    stopper = EarlyStoppingCallback(metric=VAL, **options)

    assert epochs_run(stopper, values, make, where=where) == epochs


def test_a_metric_logged_in_the_modules_on_train_epoch_end_is_seen(make):
    """Lightning calls its own kind of early stopping after the module's hook; ours is of that kind."""

    class Late(make["model"]):
        def on_train_epoch_end(self) -> None:
            self.log("late", torch.tensor(1.0))

    stopper = EarlyStoppingCallback(metric=MetricConfig(name="late", mode="max"), patience=2)
    trainer = make["trainer"](stopper, max_epochs=9)
    trainer.fit(Late(), make["loader"](2), make["loader"](1))

    assert trainer.current_epoch == 3


def test_the_reason_is_shown_and_kept(make):
    """A run that ends early says why, in the log and on the callback."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    stopper = EarlyStoppingCallback(metric=VAL, patience=1)
    try:
        epochs_run(stopper, [1, 2, 3], make)
    finally:
        logger.removeHandler(handler)

    assert stopper.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert "did not improve" in (stopper.stopping_reason_message or "")
    assert [line for line in lines if "did not improve" in line] == [
        f"Early stopping: {stopper.stopping_reason_message}"
    ]


def test_the_sanity_check_and_fast_dev_run_do_not_count(make):
    """Neither is training."""
    stopper = EarlyStoppingCallback(metric=VAL, patience=1)
    assert epochs_run(stopper, [1, 0.5, 0.2], make, num_sanity_val_steps=1) == 3
    stopper = EarlyStoppingCallback(metric=MetricConfig(name="no such", mode="min"), patience=1)
    assert epochs_run(stopper, [1], make, fast_dev_run=1) == 1
    assert stopper.wait_count == 0


def test_a_metric_that_is_never_logged_is_an_error_that_names_what_was(make):
    """Strict raises, and tells what to change; without it training goes on with one warning."""
    missing = MetricConfig(name="val/lss", mode="min")

    with pytest.raises(MissingMetricError, match=r"'val/lss'.*logged: .*val/loss.*self\.log"):
        epochs_run(EarlyStoppingCallback(metric=missing, patience=1), [1, 1], make)


def test_without_strict_a_missing_metric_is_one_warning(make, caplog):
    """Training goes on."""
    stopper = EarlyStoppingCallback(
        metric=MetricConfig(name="nope", mode="min"), patience=1, strict=False
    )
    assert epochs_run(stopper, [1, 1, 1], make) == 3
    assert len([r for r in caplog.records if "'nope'" in r.getMessage()]) == 1


def test_validation_every_second_epoch_is_waited_for(make):
    """An epoch without validation neither counts as a check nor lacks its metric."""
    stopper = EarlyStoppingCallback(metric=VAL, patience=2)

    assert epochs_run(stopper, [1] * 9, make, check_val_every_n_epoch=2) == 6


@pytest.mark.parametrize(
    ("where", "save_on_train_epoch_end"),
    # Not ("training", False): what an epoch logs after the save is lost with it.
    [("validation", False), ("validation", True), ("training", True)],
)
def test_a_run_resumed_from_its_own_checkpoint_stops_where_it_would_have(
    save_on_train_epoch_end, where, make, tmp_path
):
    """Saved at validation end or epoch end: no check is lost, repeated, or fails for want of a metric."""
    values = [5.0, 4.0, 6.0, 7.0, 8.0, 9.0]

    def run(epochs: int, name: str, path: Path | None = None) -> tuple[int, dict[str, Any]]:
        stopper = EarlyStoppingCallback(metric=VAL, patience=3)
        saver = ModelCheckpoint(
            tmp_path / name,
            "{epoch}",
            save_top_k=-1,
            save_on_train_epoch_end=save_on_train_epoch_end,
        )
        trainer = make["trainer"](
            stopper,
            Scripted(values, where=where),
            saver,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(make["model"](), make["loader"](2), make["loader"](1), ckpt_path=path)
        return trainer.current_epoch, stopper.state_dict()

    whole = run(6, "whole")
    run(3, "first")
    resumed = run(6, "second", tmp_path / "first" / "epoch=2.ckpt")

    assert whole[0] == 5
    assert resumed == whole


def test_a_value_checked_after_validation_is_not_checked_again_by_the_resumed_run(make, tmp_path):
    """Saved between the two places where one epoch can be checked: that epoch counts once."""

    def run(epochs: int, name: str, path: Path | None = None) -> dict[str, Any]:
        stopper = EarlyStoppingCallback(metric=VAL, patience=9)
        saver = ModelCheckpoint(
            tmp_path / name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False
        )
        scripted = Scripted([5.0, 6.0, 7.0, 8.0], where="both")
        trainer = make["trainer"](
            stopper, scripted, saver, max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(make["model"](), make["loader"](2), make["loader"](1), ckpt_path=path)
        return stopper.state_dict()

    whole = run(4, "whole")
    run(2, "first")

    assert whole["wait_count"] == 3
    assert run(4, "second", tmp_path / "first" / "epoch=1.ckpt") == whole


def test_a_metric_lost_with_the_interrupted_epoch_is_waited_for(make, tmp_path):
    """Saved at validation end, resumed: what that epoch logged is gone, which is not an error."""
    metric = MetricConfig(name="train/loss", mode="min")

    def run(epochs: int, path: Path | None = None) -> EarlyStoppingCallback:
        stopper = EarlyStoppingCallback(metric=metric, patience=9)
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
        trainer = make["trainer"](stopper, saver, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(make["model"](lr=0.01), make["loader"](2), make["loader"](1), ckpt_path=path)
        return stopper

    assert torch.isfinite(run(1).best_score)
    assert torch.isfinite(run(2, tmp_path / "step=2.ckpt").best_score)


def test_the_patience_of_the_new_configuration_wins():
    """A resumed run can be given more patience."""
    old = EarlyStoppingCallback(metric=VAL, patience=2)
    old.wait_count, old.best_score = 2, torch.tensor(1.5)
    new = EarlyStoppingCallback(metric=VAL, patience=7)
    new.load_state_dict(old.state_dict())

    assert (new.patience, new.wait_count, float(new.best_score)) == (7, 2, 1.5)


def test_another_metric_starts_counting_anew(caplog):
    """The best value of one metric says nothing of another."""
    old = EarlyStoppingCallback(metric=VAL, patience=2)
    old.wait_count, old.best_score = 2, torch.tensor(1.5)
    new = EarlyStoppingCallback(metric=MetricConfig(name="other", mode="max"), patience=2)
    new.load_state_dict(old.state_dict())

    assert (new.wait_count, float(new.best_score)) == (0, -float("inf"))
    assert "counting anew" in caplog.text


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    ("rates", "epochs"),
    [
        ([0.0, 0.0, 0.5, 1.0, 0.05, 0.01, 0.01, 0.01], 4),
        ([1.0, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05], 1),
        ([0.05] * 8, 7),
    ],
    ids=["warm-up", "falls at once", "never above"],
)
def test_min_lr_ends_training_when_the_rate_has_come_down(rates, epochs, tensor_lr, make):
    """From above, so not in a warm-up from 0; training ends when the next rate is too low."""

    class Scheduled(make["model"]):
        def configure_optimizers(self) -> Any:
            lr = torch.tensor(0.1) if tensor_lr else 0.1
            optimizer = torch.optim.SGD(self.parameters(), lr=lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rates[epoch])
            return [optimizer], [schedule]

    stopper = EarlyStoppingCallback(metric=VAL, patience=9, min_lr=0.01)
    assert epochs_run(stopper, [1.0] * 7, make, model=Scheduled()) == epochs
    assert ("learning rate" in (stopper.stopping_reason_message or "")) is (epochs < 7)


def test_min_lr_without_optimizer_is_ignored_with_a_warning(make, caplog):
    """A module that configures none trains on."""

    class Free(make["model"]):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    stopper = EarlyStoppingCallback(metric=VAL, patience=9, min_lr=0.01)
    with pytest.warns(UserWarning, match="without an optimizer|returned `None`"):
        assert epochs_run(stopper, [1.0, 1.0], make, model=Free()) == 2
    assert "min_lr=0.01 is ignored" in caplog.text


def test_the_floor_is_reached_only_from_above():
    """Equal to the floor counts as down; nothing observed counts for nothing."""
    floor = LearningRateFloor(0.1)

    assert [floor.is_reached(r) for r in (None, 0.0, 0.1, 0.2, 0.15, 0.1)] == [False] * 5 + [True]


def test_the_primary_metric_is_the_default():
    """Neither metric is an error that says what to set."""
    config = EarlyStoppingCallbackConfig(patience=3)
    [stopper] = create_callbacks([config], primary_metric=VAL)

    assert isinstance(stopper, EarlyStoppingCallback)
    assert stopper.monitor == "val/metric"
    assert config.metric is None
    with pytest.raises(ConfigError, match=r"primary_metric=MetricConfig"):
        create_callbacks([config])
    with pytest.raises(ConfigError, match=r"metric=MetricConfig"):
        EarlyStoppingCallback(patience=3)


@pytest.mark.parametrize(
    "options",
    [
        {"patience": -1},
        {"patience": 2.5},
        {"patience": True},
        {"patience": 1, "min_delta": -1.0},
        {"patience": 1, "min_lr": float("nan")},
        {"patience": 1, "skip_first_n_epochs": -1},
        {},
    ],
)
def test_what_makes_no_sense_is_refused(options):
    """Before any training."""
    with pytest.raises(ValidationError):
        EarlyStoppingCallbackConfig(**options)
