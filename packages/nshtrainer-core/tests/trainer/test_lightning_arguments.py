"""Every serializable argument of Lightning's Trainer, and nothing that only looks like one."""

from __future__ import annotations

import inspect
from datetime import timedelta

import lightning.pytorch as pl
import pytest
from pydantic import ValidationError

from nshtrainer import TrainerConfig
from nshtrainer.trainer.lightning_arguments import (
    NOT_IN_CONFIG,
    LightningArguments,
    lightning_kwargs,
)


def test_the_fields_are_exactly_lightnings_arguments():
    """A new release's new argument, or one that is gone, fails here first."""
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}

    assert set(LightningArguments.model_fields) == arguments - set(NOT_IN_CONFIG)
    assert set(NOT_IN_CONFIG) <= arguments


def test_nothing_is_passed_that_was_not_set():
    """Lightning's defaults, its PL_TRAINER_ variables and barebones mode stay in force."""
    assert lightning_kwargs(TrainerConfig()) == {}
    assert lightning_kwargs(TrainerConfig(max_epochs=3, fast_dev_run=False)) == {
        "max_epochs": 3,
        "fast_dev_run": False,
    }


def test_every_field_that_is_set_is_passed():
    """`check_val_every_n_epoch` was dropped; false is Lightning's None."""
    assert lightning_kwargs(TrainerConfig(check_val_every_n_epoch=10)) == {
        "check_val_every_n_epoch": 10
    }
    assert lightning_kwargs(TrainerConfig(check_val_every_n_epoch=False)) == {
        "check_val_every_n_epoch": None
    }


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("max_time", "00:12:00:00", timedelta(hours=12)),
        ("max_time", {"days": 1, "hours": 2}, timedelta(hours=26)),
        ("max_time", "PT1H30M", timedelta(minutes=90)),
        ("devices", "all", -1),
        ("devices", 2, 2),
        ("devices", [0, 1], [0, 1]),
        ("devices", "0,1", "0,1"),
        ("precision", "16-mixed", "16-mixed"),
        ("precision", 32, 32),
        ("num_nodes", 1, 1),
        ("limit_val_batches", 1, 1),
        ("limit_val_batches", 1.0, 1.0),
        ("val_check_interval", 0.25, 0.25),
        ("val_check_interval", "00:01:00:00", timedelta(hours=1)),
        ("deterministic", "warn", "warn"),
        ("fast_dev_run", 3, 3),
        ("fast_dev_run", True, True),
    ],
)
def test_lightnings_spellings_are_taken_and_keep_their_type(
    field: str, given: object, kept: object
):
    """What Lightning takes is taken here; 1 batch and 1.0 of the batches stay apart."""
    value = getattr(TrainerConfig(**{field: given}), field)

    assert value == kept
    assert type(value) is type(kept)
    for format_ in ("yaml", "json", "toml"):
        again = getattr(
            TrainerConfig.from_text(TrainerConfig(**{field: given}).to_text(format_), format_),
            field,
        )
        assert again == kept
        assert type(again) is type(kept)


@pytest.mark.parametrize(
    ("field", "given", "says"),
    [
        ("max_epochs", -2, "greater than or equal to -1"),
        ("max_epochs", "5", "valid integer"),
        ("max_epochs", True, "valid integer"),
        ("limit_train_batches", 1.5, "a number of batches from 0, or a fraction"),
        ("limit_train_batches", -1, "a number of batches from 0, or a fraction"),
        ("limit_train_batches", True, "a number of batches from 0, or a fraction"),
        ("devices", 0, "a number of devices"),
        ("devices", "two", "a number of devices"),
        ("devices", [], "a number of devices"),
        ("precision", "16-mix", "Input should be 16"),
        ("max_time", 60, "a duration needs a unit"),
        ("max_time", {"weks": 1}, "no duration"),
        ("val_check_interval", 0, "a number of batches from 1"),
        ("val_check_interval", "-PT1H", "a duration above zero"),
        ("gradient_clip_val", -1.0, "greater than or equal to 0"),
        ("gradient_clip_val", float("nan"), "NaN"),
        ("accumulate_grad_batches", 0, "greater than 0"),
        ("profiler", "simpel", "Input should be 'simple'"),
    ],
)
def test_what_lightning_would_refuse_late_is_refused_at_once(field: str, given: object, says: str):
    """The error names the field and what is expected."""
    with pytest.raises(ValidationError, match=says) as caught:
        TrainerConfig(**{field: given})

    assert caught.value.errors()[0]["loc"][0] == field
