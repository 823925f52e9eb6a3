from __future__ import annotations

import logging

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from nshtrainer import MetricConfig, create_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer_monitoring import MetricValidationCallback, MetricValidationCallbackConfig
from nshtrainer_monitoring.metric_validation.checking import is_validation_metric, nearest_metric


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
