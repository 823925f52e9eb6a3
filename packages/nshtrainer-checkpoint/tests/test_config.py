from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from nshtrainer import TrainerConfig, create_callbacks, resolve_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint import (
    BestCheckpointCallback,
    BestCheckpointCallbackConfig,
    CheckpointSavingConfig,
    LastCheckpointCallback,
    LastCheckpointCallbackConfig,
    OnExceptionCheckpointCallback,
    OnExceptionCheckpointCallbackConfig,
)

METRIC = {"name": "val/loss", "mode": "min"}


@pytest.mark.parametrize(
    "bad",
    [
        {"topk": 0},
        {"topk": -1},
        {"topk": True},
        {"topk": "5"},
        {"metric": {"name": "", "mode": "min"}},
        {"metric": {"name": "x", "mode": "least"}},
        {"max_total_bytes": True},
        {"max_total_bytes": 0},
        {"max_total_bytes": "1e999TB"},
        {"filename": ""},
        {"filename": "{epoch"},
        {"filename": "{}"},
        {"filename": "../{epoch}"},
        {"filename": "/absolute/{epoch}"},
        {"filename": "{epoch}/m"},
        {"filename": "{epoch:zz}"},
        {"filename": "m.ckpt"},
        {"filename": ".m"},
        {"dirpath": "s3://"},
        {"dirpath": Path("s3://bucket/x")},
        {"dirpath": ""},
        {"links": "junction"},
    ],
)
def test_best_refuses_what_would_fail_later(bad: dict):
    """A value that cannot work is refused when the config is made."""
    with pytest.raises(ValidationError):
        BestCheckpointCallbackConfig.model_validate(bad)


@pytest.mark.parametrize("bad", [timedelta(0), timedelta(seconds=-1), 5, True, "soon"])
def test_last_refuses_an_interval_that_is_none(bad: object):
    """An interval is longer than nothing and has a unit."""
    with pytest.raises(ValidationError):
        LastCheckpointCallbackConfig(save_on_time_interval=bad)


def test_configs_survive_a_round_trip():
    """What is written to JSON or YAML reads back equal."""
    saving = CheckpointSavingConfig(
        checkpoint_callbacks=[
            BestCheckpointCallbackConfig(metric=METRIC, topk="all", dirpath=Path("x")),
            LastCheckpointCallbackConfig(save_on_time_interval=timedelta(hours=1, seconds=1)),
            OnExceptionCheckpointCallbackConfig(filename="e{step}"),
        ]
    )

    assert CheckpointSavingConfig.model_validate_json(saving.model_dump_json()) == saving
    for format_ in ("yaml", "json", "toml"):
        assert CheckpointSavingConfig.from_text(saving.to_text(format_), format_) == saving


def test_identities_of_best_hold_the_metric():
    """Two metrics are two callbacks; the same metric twice needs a label."""
    one = BestCheckpointCallbackConfig(metric=METRIC)
    other = BestCheckpointCallbackConfig(metric={"name": "acc", "mode": "max"})
    labelled = BestCheckpointCallbackConfig(metric=METRIC, label="b")

    assert len({one.identity, other.identity, labelled.identity}) == 3


def test_default_saving_is_best_last_and_on_exception():
    """With a primary metric a run saves all three, the best one first."""
    config = TrainerConfig(primary_metric=METRIC, loggers=[])
    ours = [type(c) for c in resolve_callbacks(config) if "nshtrainer_checkpoint" in str(type(c))]

    assert ours == [BestCheckpointCallback, LastCheckpointCallback, OnExceptionCheckpointCallback]


def test_no_primary_metric_means_no_best():
    """Default saving goes without a best checkpoint; an explicit one says what is missing."""
    kinds = [type(c) for c in create_callbacks([{"name": "checkpoint_saving"}])]

    assert BestCheckpointCallback not in kinds
    assert LastCheckpointCallback in kinds
    with pytest.raises(ConfigError, match="primary_metric"):
        create_callbacks(["best_checkpoint"])
    with pytest.raises(ConfigError, match="give metric="):
        BestCheckpointCallback()


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint_saving": {"enabled": False}},
        {"checkpoint_saving": {"checkpoint_callbacks": []}},
        {"checkpoint_saving": None},
        {"fast_dev_run": True},
    ],
)
def test_switched_off_means_nothing_saves(fields: dict):
    """No callback, ours or Lightning's, saves behind the user's back."""
    from lightning.pytorch.callbacks import Checkpoint

    from nshtrainer import Trainer

    trainer = Trainer(TrainerConfig(primary_metric=METRIC, loggers=[], accelerator="cpu", **fields))

    assert not [c for c in trainer.callbacks if isinstance(c, Checkpoint)]


def test_an_explicit_best_takes_the_default_ones_place():
    """Best in `callbacks` replaces the slot's for the same metric; another metric stands beside."""
    config = TrainerConfig(
        primary_metric=METRIC,
        loggers=[],
        callbacks=[
            BestCheckpointCallbackConfig(topk=3),
            BestCheckpointCallbackConfig(metric={"name": "acc", "mode": "max"}),
        ],
    )
    best = [c for c in resolve_callbacks(config) if isinstance(c, BestCheckpointCallback)]

    assert sorted((c.monitor, c.config.topk) for c in best) == [("acc", 1), ("val/loss", 3)]


def test_metrics_that_look_alike_have_folders_of_their_own():
    """`val/loss` and `val_loss` never share a folder or a link."""
    both = [
        BestCheckpointCallbackConfig(metric={"name": n, "mode": "min"})
        for n in ("val/loss", "val_loss", "val.loss")
    ]
    alone = create_callbacks(both[:1])[0]
    folders = [c.writer.folder_name for c in create_callbacks(both)]

    assert alone.writer.folder_name == "best_val_loss"
    assert len(set(folders)) == 3
    assert folders[1] == "best_val_loss"


def test_reading_configs_imports_no_torch():
    """A login node validates a run without torch, Lightning or numpy."""
    code = (
        "import sys, nshtrainer_checkpoint\n"
        "nshtrainer_checkpoint.CheckpointSavingConfig()\n"
        "bad = {'torch', 'lightning', 'numpy', 'wandb', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
