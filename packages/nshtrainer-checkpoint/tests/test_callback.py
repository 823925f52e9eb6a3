from __future__ import annotations

import json
import logging
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from nshtrainer import MetricConfig
from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint import BestCheckpointCallback, LastCheckpointCallback
from nshtrainer_checkpoint.base import CheckpointCallback
from nshtrainer_checkpoint.metadata import SidecarReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]

MIN = {"name": "val/loss", "mode": "min"}


def best(**options: Any) -> dict[str, Any]:
    return {"name": "best_checkpoint", "metric": MIN, **options}


def last(**options: Any) -> dict[str, Any]:
    return {"name": "last_checkpoint", **options}


def only(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint_saving": {"checkpoint_callbacks": list(configs)}}


def values_in(folder: Path) -> list[float | None]:
    return sorted(r.value for r in SidecarReader().records(folder))


def test_every_hook_of_lightnings_class_is_ours():
    """A hook that a later Lightning adds would act behind our back: this notices."""
    theirs = {n for n in vars(ModelCheckpoint) if n.startswith("on_") or n in vars(Callback)}
    theirs -= {"__module__", "__doc__", "__dict__", "__weakref__"}

    assert theirs >= {"setup", "state_dict", "on_validation_end", "on_train_epoch_end"}
    assert not {n for n in theirs if n not in vars(CheckpointCallback)}
    assert "_find_last_checkpoints" in vars(CheckpointCallback)


def test_files_links_and_metadata_are_where_they_are_documented(fit, model, folder: Path):
    """The documented paths exist, the links are relative, the metadata tells what was saved."""
    trainer = fit(model([0.5, 0.25]), primary_metric=MIN, id="r")

    assert os.readlink(folder / "best_val_loss.ckpt") == (
        "best_val_loss/epoch1-step8-val_loss0.25.ckpt"
    )
    assert os.readlink(folder / "last.ckpt") == "last/epoch1-step8-duration0s.ckpt"
    best_file = folder / "best_val_loss" / "epoch1-step8-val_loss0.25.ckpt"
    metadata = json.loads(Path(f"{best_file}.metadata.json").read_text())
    assert metadata["global_step"] == 8
    assert metadata["run_id"] == "r"
    assert metadata["monitor"] == {"name": "val/loss", "mode": "min", "value": 0.25}
    assert metadata["checkpoint_size_bytes"] == best_file.stat().st_size
    assert trainer.checkpoint_callback.best_model_path == str(best_file)
    assert trainer.checkpoint_callback.best_model_score == 0.25


def test_every_file_loads_without_running_code(fit, model, folder: Path):
    """Weights, optimizer and callbacks' states are plain for torch; hyper-parameters become so."""
    fit(model(hparams={"path": Path("x"), "wait": timedelta(seconds=1)}), primary_metric=MIN)
    files = list(folder.rglob("*/*.ckpt"))

    assert len(files) == 2
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert checkpoint["hyper_parameters"] == {"path": "x", "wait": 1.0}
        assert checkpoint["callbacks"]["nshtrainer.last_checkpoint"]


@pytest.mark.parametrize(
    ("topk", "kept"), [(1, [0.1]), (2, [0.1, 0.2]), ("all", [0.1, 0.2, 0.3, 0.4])]
)
def test_best_keeps_the_best(fit, model, folder: Path, topk: Any, kept: list[float]):
    """Of four validations the best `topk` stay, whatever their order; the link leads to the best."""
    fit(model([0.3, 0.1, 0.4, 0.2]), max_epochs=4, **only(best(topk=topk)))

    assert values_in(folder / "best_val_loss") == pytest.approx(kept)
    assert "val_loss0.1" in os.readlink(folder / "best_val_loss.ckpt")


@pytest.mark.parametrize(
    "values", [[math.nan, 0.5, 0.7], [0.5, math.nan, math.nan], [-math.inf, 0.5, math.inf]]
)
def test_no_number_never_wins_nor_ends_training(fit, model, folder: Path, values: list[float]):
    """NaN and infinity rank behind every number."""
    fit(model(values), max_epochs=3, **only(best(), last()))

    assert values_in(folder / "best_val_loss") == [0.5]
    assert (folder / "last.ckpt").resolve().name.startswith("epoch2")


def test_a_typo_in_the_metric_is_said_once(fit, model, folder, caplog: pytest.LogCaptureFixture):
    """The warning tells what was logged and what is near; training goes on."""
    with caplog.at_level(logging.WARNING):
        fit(model(), **only(best(metric={"name": "val/los", "mode": "min"})))

    warnings = [r.getMessage() for r in caplog.records if "was not logged" in r.getMessage()]
    assert len(warnings) == 1
    assert "Did you mean 'val/loss'?" in warnings[0]
    assert "train/loss, val/loss" in warnings[0]
    assert len(values_in(folder / "best_val_los")) == 1


def test_a_training_metric_is_ranked_by_its_own_epoch(fit, model, folder: Path):
    """Validation ends before the epoch's mean is known; the mean of the epoch before is not used."""
    metric = {"name": "train/loss", "mode": "min"}
    trainer = fit(model(), max_epochs=3, **only(best(metric=metric, topk="all")))

    logged = {r.epoch: r.value for r in SidecarReader().records(folder / "best_train_loss")}
    assert sorted(logged) == [0, 1, 2]
    assert len(set(logged.values())) == 3
    assert logged[2] == float(trainer.callback_metrics["train/loss"])


def test_a_value_of_an_earlier_validation_does_not_count(fit, model, folder: Path):
    """A metric that is not logged this time ranks last, not by what it was."""

    class Forgetful(model):
        def on_validation_epoch_end(self) -> None:
            if self.current_epoch == 0:
                self.log("val/loss", 0.5)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    fit(Forgetful(), max_epochs=3, **only(best(topk="all")))

    records = SidecarReader().records(folder / "best_val_loss")
    assert {r.epoch: r.value for r in records} == {0: 0.5, 1: None, 2: None}


@pytest.mark.parametrize("name", ["val.loss", "acc[1]", "val:loss", "val{x}", "a/b c"])
def test_any_metric_name_works(fit, model, folder: Path, names, name: str):
    """Names that Python's `format` would trip over give a file like any other."""
    fit(model([0.5], name), max_epochs=1, **only(best(metric={"name": name, "mode": "max"})))
    (sub,) = [p for p in folder.iterdir() if p.is_dir()]

    assert len(names(sub)) == 1
    assert names(sub)[0].endswith("0.5")


def test_a_constant_name_never_loses_the_new_file(fit, model, folder: Path, names):
    """With one name for all, the new file gets a version and the old one goes, not the reverse."""
    fit(model([0.5, 0.25, 0.125]), max_epochs=3, **only(best(filename="m"), last(filename="m")))

    for sub, link in (("best_val_loss", "best_val_loss.ckpt"), ("last", "last.ckpt")):
        assert len(names(folder / sub)) == 1
        assert (folder / link).resolve().exists()
    assert values_in(folder / "best_val_loss") == [0.125]


def test_several_metrics_stand_side_by_side(fit, model, folder: Path):
    """Each metric has its own folder, link and state."""
    trainer = fit(
        model(), **only(best(), best(metric={"name": "train/loss", "mode": "max"}), last())
    )

    assert (folder / "best_val_loss.ckpt").exists()
    assert (folder / "best_train_loss.ckpt").exists()
    assert len({c.state_key for c in trainer.checkpoint_callbacks}) == 3


def test_one_folder_for_two_callbacks_is_refused(plain_fit, model):
    """By hand, two metrics that look alike in a path are told apart by a label or not at all."""
    metrics = [MetricConfig(name=n, mode="min") for n in ("val/loss", "val_loss")]

    with pytest.raises(ConfigError, match="label"):
        plain_fit(model(), [BestCheckpointCallback(metric=m) for m in metrics])


def test_steps_after_the_last_validation_are_saved_at_the_end(plain_fit, model, tmp_path: Path):
    """13 steps, validated each 5: the last checkpoint is that of step 13."""
    every_5 = {"val_check_interval": 5, "check_val_every_n_epoch": None}
    plain_fit(model(), [LastCheckpointCallback(topk=2)], max_epochs=-1, max_steps=13, **every_5)

    records = SidecarReader().records(tmp_path / "checkpoint" / "last")
    assert sorted(r.step for r in records) == [10, 13]


def test_nothing_is_written_twice_for_one_step(fit, model, folder: Path):
    """At the end of training a step that is saved already is not saved again."""
    fit(model(), **only(last(topk="all")))

    assert sorted(r.step for r in SidecarReader().records(folder / "last")) == [4, 8]


def test_without_validation_the_end_of_an_epoch_counts(fit, model, folder: Path):
    """Best and last act on training metrics at each epoch's end."""
    metric = {"name": "train/loss", "mode": "min"}
    fit(model(), validate=False, max_epochs=3, **only(best(metric=metric), last(topk="all")))

    assert sorted(r.step for r in SidecarReader().records(folder / "last")) == [4, 8, 12]
    assert [r.step for r in SidecarReader().records(folder / "best_train_loss")] == [12]


def test_an_interval_saves_between_validations(fit, model, folder: Path):
    """With an interval that is always over, each optimizer step is saved, and the last validation."""
    interval = {"save_on_time_interval": timedelta(microseconds=1), "topk": "all"}
    fit(model(), max_epochs=1, accumulate_grad_batches=2, **only(last(**interval)))

    # Step 2 again after its validation, which a resumed run does not repeat; that one replaces it.
    records = SidecarReader().records(folder / "last")
    assert sorted((r.step, r.save_number) for r in records) == [(1, 1), (2, 3)]


def test_where_nothing_can_happen_after_a_step_no_batch_is_slowed_down():
    """The per-batch hook is not there for Lightning to call."""
    metric = MetricConfig(**MIN)

    assert LastCheckpointCallback().on_train_batch_end is None
    assert BestCheckpointCallback(metric=metric).on_train_batch_end is None
    assert BestCheckpointCallback(metric=metric).on_train_batch_settled is None
    assert LastCheckpointCallback(preemption_signals=[]).on_train_batch_settled is None
    timed = LastCheckpointCallback(save_on_time_interval=timedelta(1))
    assert callable(timed.on_train_batch_settled)


def test_neither_sanity_check_nor_validate_nor_test_saves(fit, model, loader, folder: Path):
    """Only training saves."""
    trainer = fit(model(), num_sanity_val_steps=2, max_epochs=1, **only(best(topk="all")))
    before = sorted(folder.rglob("*"))
    trainer.validate(model(), loader(), verbose=False)
    trainer.test(model(), loader(), verbose=False)

    assert [r.step for r in SidecarReader().records(folder / "best_val_loss")] == [4]
    assert sorted(folder.rglob("*")) == before


def test_a_weights_only_file_is_no_last_to_resume_from(fit, model, folder: Path):
    """It loads, holds no optimizer, and `ckpt_path="last"` passes over it."""
    trainer = fit(model(), **only(last(save_weights_only=True), best()))
    file = (folder / "last.ckpt").resolve()

    assert "optimizer_states" not in torch.load(file, weights_only=True)
    found = set().union(*(c._find_last_checkpoints(trainer) for c in trainer.checkpoint_callbacks))
    assert [Path(p).parent.name for p in found] == ["best_val_loss"]


def test_no_link_if_none_is_wanted(fit, model, folder: Path):
    """`save_symlink=False` leaves only the folder."""
    fit(model(), **only(best(save_symlink=False), last(save_symlink=False)))

    assert sorted(p.name for p in folder.iterdir()) == ["best_val_loss", "last"]


def test_a_lost_best_blocks_nothing(fit, model, folder: Path):
    """A checkpoint deleted by hand no longer counts, and its link is put right."""
    trainer = fit(model([0.1]), max_epochs=1, **only(best(), last()))
    Path(trainer.checkpoint_callback.best_model_path).unlink()
    fit(model([0.75]), max_epochs=2, ckpt_path="last", **only(best(), last()))

    assert values_in(folder / "best_val_loss") == [0.75]
    assert (folder / "best_val_loss.ckpt").resolve().name == "epoch1-step8-val_loss0.75.ckpt"


def test_what_is_not_ours_is_never_deleted(fit, model, folder: Path):
    """Files of the user, of another run and with damaged metadata outlive every save."""
    sub = folder / "last"
    sub.mkdir(parents=True)
    (sub / "mine.ckpt").write_bytes(b"mine")
    (sub / "torn.ckpt").write_bytes(b"torn")
    (sub / "torn.ckpt.metadata.json").write_text("{")
    fit(model(), max_epochs=3, **only(last()))

    assert (sub / "mine.ckpt").read_bytes() == b"mine"
    assert (sub / "torn.ckpt").exists()


def test_two_runs_share_a_folder_without_touching_each_other(fit, model, tmp_path: Path):
    """With one `dirpath`, each run ranks and deletes only its own."""
    where = {"dirpath": tmp_path / "shared"}
    fit(model([0.1, 0.2]), id="one", **only(best(**where)))
    fit(model([0.9, 0.8]), id="two", **only(best(**where)))

    assert values_in(tmp_path / "shared" / "best_val_loss") == pytest.approx([0.1, 0.8])
