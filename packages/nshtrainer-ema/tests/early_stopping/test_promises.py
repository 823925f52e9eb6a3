"""What Lightning promises of early stopping holds for ours, on Lightning's own trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from pydantic import ValidationError

from nshtrainer import MetricConfig
from nshtrainer_ema import EarlyStoppingCallback
from nshtrainer_ema.early_stopping.callback import MissingMetricError

NAN, INF = float("nan"), float("inf")


def reason_of(stopper: EarlyStoppingCallback) -> str:
    return stopper.stopping_reason.name


def test_the_trainer_knows_it_as_its_early_stopping(fit, metric):
    """`trainer.early_stopping_callback(s)` are for Lightning's class and what derives from it."""
    one, two = (EarlyStoppingCallback(metric=metric, patience=3, label=x) for x in (None, "b"))
    trainer = fit([one, two], [1.0])

    assert isinstance(one, EarlyStopping)
    assert trainer.early_stopping_callback is one
    assert trainer.early_stopping_callbacks == [one, two]


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [
        ([6, 5, 5, 5, 5, 5], 3, 5),
        ([6, 5, 4, 4, 3, 3], 1, 4),
        ([6, 5, 6, 5, 5, 5], 3, 5),
        ([6, 5, 6, 7, 4, 3], 3, 6),
    ],
)
def test_patience_counts_checks_without_improvement_in_a_row(values, patience, epochs, fit, metric):
    """A better value starts it anew, an equal one does not."""
    stopper = EarlyStoppingCallback(metric=metric, patience=patience)
    trainer = fit(stopper, values)

    assert trainer.current_epoch == epochs
    stopped = epochs < len(values)
    assert reason_of(stopper) == ("PATIENCE_EXHAUSTED" if stopped else "NOT_STOPPED")
    assert stopper.stopped_epoch == (epochs - 1 if stopped else 0)


@pytest.mark.parametrize("patience", [0, 1])
def test_no_patience_ends_at_the_first_check_without_improvement(patience, fit, metric):
    """Zero and one are the same."""
    stopper = EarlyStoppingCallback(metric=metric, patience=patience)

    assert fit(stopper, [3, 2, 2, 1]).current_epoch == 3


def test_the_mode_says_which_way_is_better(fit):
    """Higher for `max`; anything else is refused."""
    highest = MetricConfig(name="val/metric", mode="max")
    stopper = EarlyStoppingCallback(metric=highest, patience=2)
    assert fit(stopper, [1, 2, 3, 3, 3, 9]).current_epoch == 5
    assert float(stopper.best_score) == 3.0

    with pytest.raises(ValidationError, match="'min' or 'max'"):
        EarlyStoppingCallback(metric={"name": "val/metric", "mode": "best"}, patience=2)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_ends_training(value, fit, metric):
    """With `check_finite`, whatever patience is left; the best value stays."""
    stopper = EarlyStoppingCallback(metric=metric, patience=9)

    assert fit(stopper, [2, value, 1, 1]).current_epoch == 2
    assert reason_of(stopper) == "NON_FINITE_METRIC"
    assert float(stopper.best_score) == 2.0
    assert "not finite" in (stopper.stopping_reason_message or "")


def test_without_check_finite_such_values_are_not_better(fit, metric):
    """They use up patience."""
    stopper = EarlyStoppingCallback(metric=metric, patience=2, check_finite=False)

    assert fit(stopper, [2, NAN, INF, 1]).current_epoch == 3
    assert reason_of(stopper) == "PATIENCE_EXHAUSTED"


@pytest.mark.parametrize(
    ("options", "values", "epochs", "reason"),
    [
        ({"stopping_threshold": 1.5}, [4, 3, 1, 1], 3, "STOPPING_THRESHOLD"),
        ({"stopping_threshold": 1.0}, [4, 3, 1, 0.5], 4, "STOPPING_THRESHOLD"),
        ({"divergence_threshold": 7.0}, [4, 8, 1, 1], 2, "DIVERGENCE_THRESHOLD"),
        ({"divergence_threshold": 8.0}, [4, 8, 1, 9], 4, "DIVERGENCE_THRESHOLD"),
        ({"stopping_threshold": 1.0, "divergence_threshold": 7.0}, [4, 3, 2, 2], 4, "NOT_STOPPED"),
    ],
)
def test_thresholds_end_training_once_they_are_passed(options, values, epochs, reason, fit, metric):
    """Passed, not reached; whatever patience is left."""
    stopper = EarlyStoppingCallback(metric=metric, patience=9, **options)

    assert (fit(stopper, values).current_epoch, reason_of(stopper)) == (epochs, reason)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"min_epochs": 4}, 4), ({"min_steps": 9}, 5), ({"min_epochs": 1, "min_steps": 1}, 2)],
)
def test_training_goes_on_until_the_minimum(options, epochs, fit, metric):
    """`min_epochs` and `min_steps` hold, and the reason to stop is not forgotten meanwhile."""
    stopper = EarlyStoppingCallback(metric=metric, patience=1)

    assert fit(stopper, [2, 3, 1, 0.5, 0.2, 0.1], **options).current_epoch == epochs
    assert reason_of(stopper) == "PATIENCE_EXHAUSTED"
    assert stopper.stopped_epoch == 1
    assert float(stopper.best_score) == pytest.approx([2, 2, 1, 0.5, 0.2, 0.1][epochs - 1])


def test_validations_inside_of_an_epoch_are_checks_and_end_it(fit, metric):
    """Training ends in the middle of the second epoch."""
    stopper = EarlyStoppingCallback(metric=metric, patience=3)
    values = [1.0] * 12
    trainer = fit(stopper, values, batches=4, val_check_interval=2, max_epochs=3)
    assert trainer.global_step == 8

    stopper = EarlyStoppingCallback(metric=metric, patience=2)
    trainer = fit(stopper, values, batches=4, val_check_interval=2, max_epochs=3)
    assert (trainer.global_step, stopper.stopped_epoch) == (6, 1)


def test_validations_that_go_by_steps_alone_are_checks(fit, metric):
    """`check_val_every_n_epoch=None`: every three batches, over epochs of two."""
    stopper = EarlyStoppingCallback(metric=metric, patience=1)
    trainer = fit(
        stopper, [1.0] * 9, check_val_every_n_epoch=None, val_check_interval=3, max_epochs=9
    )

    assert trainer.global_step == 6


def test_a_metric_of_training_is_checked_at_the_end_of_epochs(make_model, fit):
    """Without validation too."""

    class Still(make_model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train/still", 1.0, on_step=False, on_epoch=True)
            return self.loss(batch)

    still = MetricConfig(name="train/still", mode="min")
    for options in ({}, {"limit_val_batches": 0}):
        stopper = EarlyStoppingCallback(metric=still, patience=2)
        assert fit(stopper, [1] * 9, model=Still(), **options).current_epoch == 3


def test_manual_optimization_is_stopped(make_model, fit, metric):
    """Steps of all optimizers count for patience in steps."""

    class Manual(make_model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr=0.01) for m in (self.first, self.second)]

    stopper = EarlyStoppingCallback(metric=metric, patience=2)
    assert fit(stopper, [1] * 9, model=Manual()).current_epoch == 3
    stopper = EarlyStoppingCallback(metric=metric, patience=8, patience_unit="steps")
    assert fit(stopper, [1] * 9, model=Manual()).global_step == 4 + 8


def test_of_several_the_first_to_be_satisfied_ends_training(fit, metric):
    """Each with its own counts and, by its label, its own place in checkpoints."""
    patient = EarlyStoppingCallback(metric=metric, patience=9)
    strict = EarlyStoppingCallback(metric=metric, patience=9, stopping_threshold=2.5, label="goal")
    trainer = fit([patient, strict], [4, 3, 3, 2, 1])

    assert trainer.current_epoch == 4
    assert (reason_of(patient), reason_of(strict)) == ("NOT_STOPPED", "STOPPING_THRESHOLD")
    assert patient.state_key == "nshtrainer.early_stopping"
    assert strict.state_key == "nshtrainer.early_stopping#goal"


def test_each_of_several_resumes_from_its_own_state(fit, metric, tmp_path):
    """And a label that is new begins anew."""
    labels = ("a", "b")
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    stoppers = [
        EarlyStoppingCallback(metric=metric, patience=9, min_delta=delta, label=label)
        for label, delta in zip(labels, (0.0, 10.0), strict=True)
    ]
    fit(stoppers, [5, 4, 3], saver, enable_checkpointing=True)
    again = [EarlyStoppingCallback(metric=metric, patience=9, label=x) for x in ("b", "a", "c")]
    fit(
        again, [0, 0, 0, 4], saver, first=3, ckpt_path=tmp_path / "epoch=2.ckpt",
        enable_checkpointing=True,
    )  # fmt: skip

    assert [s.wait_count for s in stoppers] == [0, 2]
    assert [(s.wait_count, float(s.best_score)) for s in again] == [(0, 4.0), (1, 3.0), (0, 4.0)]


@pytest.mark.parametrize("last", [True, "link"])
def test_a_run_resumes_from_its_own_last_checkpoint(last, fit, metric, tmp_path):
    """Counts and best value go on, the patience is the new one, and the old end is told of."""
    seen: list[tuple[str, str | None]] = []

    class Loaded(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((reason_of(again), again.stopping_reason_message))

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_last=last)

    first = EarlyStoppingCallback(metric=metric, patience=2)
    fit(first, [3, 4, 5, 6], saver(), enable_checkpointing=True)
    assert first.stopped_epoch == 2
    again = EarlyStoppingCallback(metric=metric, patience=4)
    trainer = fit(
        again, [0, 0, 0, 6, 7, 8], Loaded(), saver(), first=3, enable_checkpointing=True,
        ckpt_path=tmp_path / "last.ckpt",
    )  # fmt: skip

    assert seen == [("PATIENCE_EXHAUSTED", first.stopping_reason_message)]
    assert (trainer.current_epoch, again.wait_count, again.patience) == (5, 4, 4)
    assert again.stopped_epoch == 4
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = file["callbacks"]["nshtrainer.early_stopping"]
    assert (state["stopped_epoch"], state["wait_count"]) == (4, 4)
    assert state["stopping_reason"] == EarlyStoppingReason.PATIENCE_EXHAUSTED.value
    assert state["stopping_reason_message"] == again.stopping_reason_message


def test_with_the_same_patience_a_stopped_run_is_resumed_for_one_more_check(fit, metric, tmp_path):
    """Patience is still used up; a better value gives it back."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(
        EarlyStoppingCallback(metric=metric, patience=2), [3, 4, 5], saver,
        enable_checkpointing=True,
    )  # fmt: skip
    for value, epochs in ((6.0, 4), (1.0, 6)):
        stopper = EarlyStoppingCallback(metric=metric, patience=2)
        trainer = fit(stopper, [0, 0, 0, value, 6, 6], first=3, ckpt_path=tmp_path / "epoch=2.ckpt")
        assert trainer.current_epoch == epochs


def test_another_mode_starts_counting_anew(metric, caplog):
    """The lowest value says nothing of the highest."""
    old = EarlyStoppingCallback(metric=metric, patience=2)
    old._evaluate_stopping_criteria(torch.tensor(1.0))
    new = EarlyStoppingCallback(metric=metric.replace(mode="max"), patience=2)
    new.load_state_dict(old.state_dict())

    assert float(new.best_score) == -INF
    assert (
        "(min) when this checkpoint was saved and now waits for 'val/metric' (max)" in caplog.text
    )


def test_a_metric_that_only_some_validations_log_is_checked_when_it_is(make_model, fit):
    """An old value is never taken for a new one."""

    class Sometimes(make_model):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking and self.current_epoch % 2 == 0:
                self.log("rare", 1.0)

    rare = MetricConfig(name="rare", mode="min")
    stopper = EarlyStoppingCallback(metric=rare, patience=2, strict=False)

    assert fit(stopper, [1] * 9, model=Sometimes()).current_epoch == 5


def test_a_metric_that_is_missing_is_an_error_or_not(fit):
    """By `strict`."""
    missing = MetricConfig(name="missing", mode="min")
    with pytest.raises(MissingMetricError, match="'missing', which was not logged in epoch 0"):
        fit(EarlyStoppingCallback(metric=missing, patience=2), [1, 1])
    stopper = EarlyStoppingCallback(metric=missing, patience=2, strict=False)

    assert fit(stopper, [1, 1, 1]).current_epoch == 3
    assert stopper.wait_count == 0


def test_validate_and_test_are_no_checks(fit, metric, make_loader, make_model):
    """Only training is watched."""
    stopper = EarlyStoppingCallback(metric=metric, patience=2)
    model = make_model()
    trainer = fit(stopper, [3, 2], model=model)
    before = stopper.state_dict()
    trainer.validate(model, make_loader(1), verbose=False)
    trainer.test(model, make_loader(1), verbose=False)

    assert stopper.state_dict() == before


def test_a_stop_that_others_ask_for_is_theirs(fit, metric):
    """Ours neither takes it back nor takes it for its own."""

    class Asks(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    stopper = EarlyStoppingCallback(metric=metric, patience=9)

    assert fit(stopper, [3, 2, 1, 0], Asks()).current_epoch == 2
    assert reason_of(stopper) == "NOT_STOPPED"


def test_a_second_fit_is_not_stopped_by_the_first(fit, metric, make_loader, make_model):
    """The reason of an earlier fit is gone when the next begins; its counts stay."""
    reasons: list[str] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            reasons.append(reason_of(stopper))

    stopper = EarlyStoppingCallback(metric=metric, patience=2)
    values = [3, 4, 5, 1, 1, 1]
    trainer = fit(stopper, values, Looks())
    assert trainer.current_epoch == 3
    trainer.fit(make_model(), make_loader(2), make_loader(1))

    assert trainer.current_epoch == 6
    assert reasons == ["NOT_STOPPED", "NOT_STOPPED"]
