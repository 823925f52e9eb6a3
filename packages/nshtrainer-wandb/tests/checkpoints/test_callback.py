from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import WandbLogger

from nshtrainer import Trainer
from nshtrainer.runtime.events import ON_CHECKPOINT_REMOVED, ON_CHECKPOINT_SAVED, emit
from nshtrainer_wandb import WandbCheckpointsCallback

pytestmark = [
    pytest.mark.slow,  # a W&B run takes half a second to open
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning with new torch
]


class Saves(Checkpoint):
    """Saves a directory of two files at each batch, keeps the last one, and saves on an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._save(trainer)
        if len(self.kept) > 1:
            old = self.kept.pop(0)
            shutil.rmtree(old)
            emit(trainer, ON_CHECKPOINT_REMOVED, old)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._save(trainer, "exception")

    def _save(self, trainer, name="step") -> None:
        path = self.folder / f"{name}{trainer.global_step}.ckpt"
        path.mkdir(parents=True, exist_ok=True)
        (path / "shard0").write_text(f"zero of {path.name}")
        (path / "shard1").write_text("one")
        self.kept.append(path)
        metadata = {"global_step": trainer.global_step, "checkpoint_checksum": str(path)}
        emit(trainer, ON_CHECKPOINT_SAVED, path, metadata)


def _loggers(log_model):
    return [{"name": "wandb", "watch": None, "log_code": None, "log_model": log_model}]


@pytest.mark.parametrize("log_model", ["all", "latest"])
def test_sharded_directory_that_is_left_goes_up_whole(
    log_model, make_config, model, batches, written, project
):
    """Offline nothing could be taken back, so either way only what is left is logged."""
    config = make_config(loggers=_loggers(log_model))

    Trainer(config, callbacks=[Saves(project / "c")]).fit(model, batches)

    (run,) = written()
    (version,) = run.versions
    assert (version.name, version.type, version.aliases) == (f"model-{run.id}", "model", ["latest"])
    assert set(version.files) == {"shard0", "shard1"}
    assert Path(version.files["shard0"]).read_text() == "zero of step4.ckpt"
    assert version.metadata["original_filename"] == "step4.ckpt"


def test_checkpoint_saved_while_an_exception_is_handled_goes_up(
    make_config, failing_model, batches, written, project
):
    """It is logged after what was left, and before the run is finished."""
    config = make_config(loggers=_loggers("latest"))

    with pytest.raises(RuntimeError, match="the model failed"):
        Trainer(config, callbacks=[Saves(project / "c")]).fit(failing_model, batches)

    (run,) = written()
    contents = [Path(v.files["shard0"]).read_text() for v in run.versions]
    assert run.exit_code == 1
    assert contents == ["zero of step2.ckpt", "zero of exception2.ckpt"]


def test_without_log_model_nothing_goes_up(make_config, model, batches, written, project):
    """Uploading is asked for."""
    config = make_config(loggers=_loggers(False))

    Trainer(config, callbacks=[Saves(project / "c")]).fit(model, batches)

    (run,) = written()
    assert run.versions == []


class Vanishes(Callback):
    """Tells of a checkpoint that is not there."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        emit(trainer, ON_CHECKPOINT_SAVED, Path("nowhere.ckpt"), {})


def test_checkpoint_that_cannot_be_read_is_a_warning(make_config, model, batches, written, caplog):
    """Training, and the run's end, go on."""
    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        Trainer(make_config(loggers=_loggers("latest")), callbacks=[Vanishes()]).fit(model, batches)

    (run,) = written()
    assert "could not be uploaded to W&B" in caplog.text
    assert run.exit_code == 0


def test_plain_trainer_with_lightnings_logger_uploads(tmp_path, model, batches, written, project):
    """Nothing of it needs our trainer or our logger."""
    trainer = LightningTrainer(
        accelerator="cpu", max_epochs=1, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False, logger=WandbLogger(save_dir=project, project="p"),
        callbacks=[WandbCheckpointsCallback(upload="all"), Saves(project / "c")],
    )  # fmt: skip
    trainer.fit(model, batches)

    import wandb

    wandb.finish()
    (run,) = written()
    assert [sorted(v.files) for v in run.versions] == [["shard0", "shard1"]]


def test_without_a_wandb_logger_it_says_so(tmp_path, model, batches, caplog):
    """One warning, and training goes on."""
    trainer = LightningTrainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[WandbCheckpointsCallback()],
    )  # fmt: skip

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        trainer.fit(model, batches)

    assert caplog.text.count("no W&B logger") == 1
    assert trainer.global_step == 4
