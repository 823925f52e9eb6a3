from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pydantic import ValidationError

from nshtrainer import MetricConfig, create_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer_monitoring import MetricValidationCallback, MetricValidationCallbackConfig
from nshtrainer_monitoring.metric_validation.checking import is_validation_metric, nearest_metric
from nshtrainer_monitoring.metric_validation.values import find_disagreement, find_wrong_value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/loss", True),
        ("val_loss", True),
        ("valid.acc", True),
        ("Validation/x", True),
        ("value", False),
        ("train/val", False),
        ("loss", False),
    ],
)
def test_names_say_where_they_come_from(name, expected):
    """Only what is named as a validation metric is expected after a validation alone."""
    assert is_validation_metric(name) is expected


def test_nearest_sees_through_separators_and_slips():
    """A wrong separator or letter finds the name that was meant; nothing alike finds none."""
    logged = ["train/loss", "val/loss"]

    assert nearest_metric("val_loss", logged) == "val/loss"
    assert nearest_metric("vla/loss", logged) == "val/loss"
    assert nearest_metric("accuracy", logged) is None


def test_a_typo_stops_the_run_after_the_sanity_check(net, make_trainer):
    """No step is made for a metric that nobody logs; the message names the nearest one."""
    trainer = make_trainer(MetricValidationCallback(metrics=["val_loss"]), num_sanity_val_steps=1)

    with pytest.raises(ConfigError, match=r"nearest logged: 'val/loss'") as error:
        trainer.fit(net())
    assert trainer.global_step == 0
    assert "after the sanity check, 1 of 1" in str(error.value)
    assert "self.log" in str(error.value)


def test_without_a_sanity_check_the_first_validation_tells(net, make_trainer):
    """The check comes with the first validation where there is no sanity check."""
    trainer = make_trainer(MetricValidationCallback(metrics=["val/typo"]), max_epochs=5)

    with pytest.raises(ConfigError, match="after the first validation"):
        trainer.fit(net())
    assert trainer.current_epoch == 0


@pytest.mark.parametrize("sanity", [0, 1])
def test_what_checkpoints_accept_is_accepted(net, make_trainer, sanity):
    """Train-only, per step and epoch, from end-of-epoch hooks, with no logger: all are found."""

    class Various(net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("both", loss, on_step=True, on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            self.log("late", 1.0)

        def on_validation_epoch_end(self):
            self.log("val/late", 1.0)

    names = ["train/loss", "both", "both_epoch", "both_step", "late", "val/late", "val/loss"]
    trainer = make_trainer(
        MetricValidationCallback(metrics=names), num_sanity_val_steps=sanity, max_epochs=2
    )

    trainer.fit(Various())

    assert trainer.current_epoch == 2


def test_a_train_only_typo_is_found_after_one_epoch(net, make_trainer):
    """What may come from training is looked for once an epoch and a validation are complete."""
    trainer = make_trainer(
        MetricValidationCallback(metrics=["train_los"]), num_sanity_val_steps=1, max_epochs=5
    )

    with pytest.raises(ConfigError, match=r"nearest logged: 'train/loss'"):
        trainer.fit(net())
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    "options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 9, "max_epochs": 2}]
)
def test_nothing_is_missing_where_no_validation_ran(net, make_trainer, options):
    """A run without validation is not blamed for the lack of its metrics."""
    trainer = make_trainer(MetricValidationCallback(metrics=["val/loss", "other"]), **options)

    trainer.fit(net())

    assert trainer.state.finished


def test_warning_comes_once_and_the_run_goes_on(net, make_trainer, caplog):
    """With error_behavior="warn" each metric is named once."""
    callback = MetricValidationCallback(metrics=["val/typo"], error_behavior="warn")
    trainer = make_trainer(callback, num_sanity_val_steps=1, max_epochs=3)

    with caplog.at_level(logging.WARNING, "nshtrainer_monitoring"):
        trainer.fit(net())

    assert [r.message.count("'val/typo'") for r in caplog.records if r.levelname == "WARNING"] == [
        1
    ]


@pytest.mark.parametrize(
    "waiting",
    [
        lambda path: EarlyStopping("val/typo", check_on_train_epoch_end=True),
        lambda path: ModelCheckpoint(path, monitor="val/typo"),
    ],
    ids=["early_stopping", "checkpoint"],
)
def test_what_other_callbacks_wait_for_is_required(net, make_trainer, tmp_path, waiting):
    """A metric that early stopping or a checkpoint monitors is looked for without being listed."""
    other = waiting(tmp_path)
    options = {"enable_checkpointing": isinstance(other, ModelCheckpoint)}
    trainer = make_trainer(MetricValidationCallback(), other, num_sanity_val_steps=1, **options)

    with pytest.raises(ConfigError, match=f"required by {type(other).__name__}"):
        trainer.fit(net())


@pytest.mark.filterwarnings("ignore:Early stopping conditioned on")  # what strict=False does
def test_optional_metrics_stay_optional(net, make_trainer):
    """Early stopping with strict=False says that its metric may be absent."""
    other = EarlyStopping("val/typo", strict=False, verbose=False)
    trainer = make_trainer(MetricValidationCallback(), other, num_sanity_val_steps=1)

    trainer.fit(net())

    assert trainer.state.finished


@pytest.mark.parametrize("validate_default_metric", [True, False])
def test_the_primary_metric_is_required_if_asked(net, make_trainer, validate_default_metric):
    """The run's primary metric is looked for, unless the configuration says otherwise."""
    config = MetricValidationCallbackConfig(validate_default_metric=validate_default_metric)
    primary = MetricConfig(name="val/typo", mode="min")
    trainer = make_trainer(
        *create_callbacks([config], primary_metric=primary), num_sanity_val_steps=1
    )

    if validate_default_metric:
        with pytest.raises(ConfigError, match="required by primary_metric"):
            trainer.fit(net())
    else:
        trainer.fit(net())


def plateau(monitor, *, strict=True):
    """Optimizers with a `ReduceLROnPlateau` that waits for *monitor*."""

    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        waits = {"scheduler": scheduler, "monitor": monitor, "strict": strict}
        return {"optimizer": optimizer, "lr_scheduler": waits}

    return configure


def test_what_a_scheduler_waits_for_is_required(net, make_trainer):
    """A typo in a plateau scheduler's `monitor` is found before the first step."""
    trainer = make_trainer(MetricValidationCallback(), num_sanity_val_steps=1)

    with pytest.raises(ConfigError, match=r"'val/los' .*required by ReduceLROnPlateau"):
        trainer.fit(net(configure=plateau("val/los")))
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on")  # what strict=False does
@pytest.mark.parametrize(("monitor", "strict"), [("val/los", False), ("val/loss", True)])
def test_a_scheduler_that_is_content_is_left_alone(net, make_trainer, monitor, strict):
    """A metric that is there, or may be absent (strict=False), stops nothing."""
    trainer = make_trainer(MetricValidationCallback(), num_sanity_val_steps=1)

    trainer.fit(net(configure=plateau(monitor, strict=strict)))

    assert trainer.state.finished


@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains")  # that it is ignored
def test_manual_optimization_steps_its_own_schedulers(net, make_trainer):
    """Lightning gives a plateau scheduler no metric there, so that none is required."""

    def configure(module):
        scheduled = plateau("val/typo")(module)
        return [scheduled["optimizer"]], [scheduled["lr_scheduler"]]

    trainer = make_trainer(MetricValidationCallback(), num_sanity_val_steps=1)

    trainer.fit(net(optimizers=2, configure=configure))

    assert trainer.state.finished


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_validation_without_batches_is_none(net, make_trainer):
    """A sanity check that has no batch says nothing, and so nothing is missing after it."""

    class Empty(net):
        def val_dataloader(self):
            return []

    trainer = make_trainer(MetricValidationCallback(metrics=["val/x"]), num_sanity_val_steps=2)

    trainer.fit(Empty())

    assert trainer.state.finished


@pytest.mark.parametrize(
    ("value", "bounds", "finite", "problem"),
    [
        (0.5, (0.0, 1.0), True, None),
        (1.5, (0.0, 1.0), False, "is 1.5, and a value from 0 to 1 is expected"),
        (-1.0, (0.0, None), False, "is -1, and at least 0 is expected"),
        (2.0, (None, 1.0), False, "is 2, and at most 1 is expected"),
        (float("nan"), (0.0, None), False, "is nan, and at least 0 is expected"),
        (float("inf"), None, True, "is inf, and a finite number is expected"),
        (float("inf"), None, False, None),
    ],
)
def test_wrong_values_are_described(value, bounds, finite, problem):
    """A value outside of its range, NaN included, and one that is not finite, if that is asked."""
    assert find_wrong_value(value, bounds, finite=finite) == problem


def test_ranks_that_differ_are_described():
    """Different values differ, so does a value that one rank lacks; NaN equals NaN."""
    assert find_disagreement([1.0, 1.0]) is None
    assert find_disagreement([float("nan"), float("nan")]) is None
    assert find_disagreement([None, None]) is None
    assert find_disagreement([1.0, 2.5]) == "differs between ranks (rank 0: 1, rank 1: 2.5)"
    assert find_disagreement([1.0, None]) == "differs between ranks (rank 0: 1, rank 1: nothing)"


def logging_values(net, *values):
    """A module that logs *values* as `val/x`, one after each validation, the last one for good."""

    class Logs(net):
        def on_validation_epoch_end(self):
            self.log("val/x", values[min(self.done, len(values) - 1)])
            self.done += 1

    module = Logs()
    module.done = 0
    return module


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        ({"metrics": ["val/x"], "check_finite": True}, float("nan"), "'val/x' is nan"),
        ({"ranges": {"val/x": (0, 1)}}, 7.0, "'val/x' is 7, and a value from 0 to 1"),
    ],
)
@pytest.mark.parametrize("sanity", [0, 1])
def test_wrong_values_stop_the_run(net, make_trainer, options, value, message, sanity):
    """The first validation, that of the sanity check included, shows values that cannot be right."""
    callback = MetricValidationCallback(**options)
    trainer = make_trainer(callback, num_sanity_val_steps=sanity, max_epochs=3)

    with pytest.raises(ConfigError, match=message) as error:
        trainer.fit(logging_values(net, value))
    assert trainer.current_epoch == 0
    assert trainer.global_step == (0 if sanity else 6)
    assert "check_finite" in str(error.value)


def test_values_are_looked_at_after_every_validation(net, make_trainer):
    """A metric that becomes NaN later stops the run then."""
    callback = MetricValidationCallback(metrics=["val/x"], check_finite=True)
    trainer = make_trainer(callback, max_epochs=5)

    with pytest.raises(ConfigError, match="after a validation, 1 metrics have values"):
        trainer.fit(logging_values(net, 1.0, 1.0, float("nan")))
    assert trainer.current_epoch == 2


def test_values_are_not_looked_at_unless_asked(net, make_trainer):
    """By default a required metric may be anything."""
    trainer = make_trainer(MetricValidationCallback(metrics=["val/x"]))

    trainer.fit(logging_values(net, float("nan")))

    assert trainer.state.finished


def test_wrong_values_are_warned_of_once(net, make_trainer, caplog):
    """With error_behavior="warn" the run goes on, and a metric is named once."""
    callback = MetricValidationCallback(ranges={"val/x": (0, 1)}, error_behavior="warn")

    with caplog.at_level(logging.WARNING, "nshtrainer_monitoring"):
        make_trainer(callback, max_epochs=3).fit(logging_values(net, 7.0))

    assert len([r for r in caplog.records if "'val/x' is 7" in r.message]) == 1


def test_a_metric_with_a_range_is_required(net, make_trainer):
    """A range for a name that nobody logs is a typo too."""
    callback = MetricValidationCallback(ranges={"val/los": (0, None)})
    trainer = make_trainer(callback, num_sanity_val_steps=1)

    with pytest.raises(ConfigError, match=r"nearest logged: 'val/loss'.*metric_validation.ranges"):
        trainer.fit(net())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 0], "from its lower bound to its upper one"),
        ([None, None], "without bounds checks nothing"),
        ([0], "Field required"),
        (["0", 1], "remove the quotes"),
    ],
)
def test_ranges_that_are_none_are_refused(bounds, message):
    """A range that no value fits, or that every value fits, is an error before the run."""
    with pytest.raises(ValidationError, match=message):
        MetricValidationCallbackConfig.model_validate({"ranges": {"val/x": bounds}})
