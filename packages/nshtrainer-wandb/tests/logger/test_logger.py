from __future__ import annotations

import copy
import logging
import pickle
import signal
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from pydantic import BaseModel

from nshtrainer import Trainer

pytestmark = [
    pytest.mark.slow,  # a W&B run takes half a second to open
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning with new torch
]

ONLY_LOGGER = {"name": "wandb", "watch": None, "log_code": None}


def test_run_has_the_identity_and_the_metrics(
    make_config, validated_model, batches, written, project: Path
):
    """Id, project, name, tags, notes and metrics arrive in `<run>/log/wandb`; the run is finished."""
    config = make_config(
        loggers=[ONLY_LOGGER], id="run1", name=["big", "model"], tags=["t"], notes=["one", "two"]
    )

    trainer = Trainer(config)
    trainer.fit(validated_model, batches, batches)

    (run,) = written()
    assert (run.id, run.project, run.name) == ("run1", "my-project", "big model")
    assert (run.tags, run.notes, run.exit_code) == (["t"], "one\ntwo", 0)
    losses = [row["train/loss"] for row in run.history if "train/loss" in row]
    assert losses[-1] == trainer.callback_metrics["train/loss"].item()
    assert [r["trainer/global_step"] for r in run.history if "train/loss" in r] == [0, 1, 2, 3]
    assert any("val/loss" in row for row in run.history)
    (file,) = project.rglob("*.wandb")
    assert file.is_relative_to(project / "nshtrainer_logs" / "run1" / "log" / "wandb")


def test_building_a_trainer_creates_nothing(make_config, project: Path):
    """No run is opened and no folder made before the trainer is used."""
    import wandb

    Trainer(make_config(loggers=[ONLY_LOGGER]))

    assert list(project.iterdir()) == []
    assert wandb.run is None


def test_copying_the_logger_opens_no_run(make_config):
    """A copy for another process, or of a callback, starts without a run of its own."""
    import wandb

    (logger,) = Trainer(make_config(loggers=[ONLY_LOGGER], id="r")).loggers

    assert pickle.loads(pickle.dumps(logger)).version == "r"
    assert copy.deepcopy(logger).version == "r"
    assert wandb.run is None


class Options(BaseModel):
    """Hyper-parameters, one of which is none of W&B's business."""

    depth: int = 3
    password: str = "letmein"  # noqa: S105 -- the point of the test


def test_secrets_do_not_reach_the_config(make_config, model, batches, written, monkeypatch):
    """Configuration and hyper-parameters are logged without secrets, models as mappings."""
    monkeypatch.setenv("MY_API_KEY", "hunter2hunter2")

    model.save_hyperparameters({"options": Options(), "comment": "uses hunter2hunter2"})
    meta = {"db_password": "letmein", "lr": 0.1}

    Trainer(make_config(loggers=[ONLY_LOGGER], meta=meta)).fit(model, batches)

    (run,) = written()
    assert run.config["trainer"]["meta"] == {"db_password": "[redacted]", "lr": 0.1}
    assert run.config["options"] == {"depth": 3, "password": "[redacted]"}
    assert run.config["comment"] == "uses [redacted]"


def test_failed_run_is_finished_and_the_next_one_is_its_own(
    make_config, model, failing_model, batches, written
):
    """After an exception the run is marked as failed, and another trainer opens a new one."""
    import wandb

    with pytest.raises(RuntimeError, match="the model failed"):
        Trainer(make_config(loggers=[ONLY_LOGGER], id="first")).fit(failing_model, batches)
    assert wandb.run is None
    Trainer(make_config(loggers=[ONLY_LOGGER], id="second")).fit(model, batches)

    first, second = written()
    assert (first.id, first.exit_code) == ("first", 1)
    assert (second.id, second.exit_code) == ("second", 0)


class Interrupts(Callback):
    """Somebody presses Ctrl-C in the second batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 1:
            raise KeyboardInterrupt


@pytest.fixture
def interrupts():
    """Lightning ignores further SIGINTs from then on; the other tests should not."""
    before = signal.getsignal(signal.SIGINT)
    yield Interrupts()
    signal.signal(signal.SIGINT, before)


def test_interrupted_run_is_finished(make_config, model, batches, written, interrupts):
    """Ctrl-C ends the run as failed, and what comes next in the process is a run of its own."""
    import wandb

    trainer = Trainer(make_config(loggers=[ONLY_LOGGER], id="first"), callbacks=[interrupts])
    with pytest.raises(SystemExit):
        trainer.fit(model, batches)
    assert wandb.run is None
    Trainer(make_config(loggers=[ONLY_LOGGER], id="second")).fit(model, batches)

    assert [(run.id, run.exit_code) for run in written()] == [("first", 1), ("second", 0)]


class FailsTwice(Callback):
    """Fails while an exception is handled, before Lightning comes to the loggers."""

    def on_exception(self, trainer, pl_module, exception) -> None:
        raise ValueError("and again")


def test_run_that_lightning_did_not_finish_is_finished_by_the_next(
    make_config, model, failing_model, batches, written
):
    """Even an exception within the handling of one leaves no run to the next trainer."""
    trainer = Trainer(make_config(loggers=[ONLY_LOGGER], id="first"), callbacks=[FailsTwice()])
    with pytest.raises(ValueError, match="and again"):
        trainer.fit(failing_model, batches)
    Trainer(make_config(loggers=[ONLY_LOGGER], id="second")).fit(model, batches)

    first, second = written()
    assert (first.id, second.id) == ("first", "second")
    assert first.exit_code is not None
    assert [row["trainer/global_step"] for row in second.history if "train/loss" in row] == [
        0, 1, 2, 3,
    ]  # fmt: skip


def test_second_fit_continues_the_run(make_config, model, batches, written):
    """Another `fit` of the same trainer is the same run, opened and finished once more."""
    trainer = Trainer(make_config(loggers=[ONLY_LOGGER], id="one"))
    trainer.fit(model, batches)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches)

    first, second = written()
    assert [(r.id, r.exit_code) for r in (first, second)] == [("one", 0)] * 2
    steps = [row["trainer/global_step"] for row in second.history if "train/loss" in row]
    assert steps == [4, 5, 6, 7]


def test_test_after_fit_continues_the_run(make_config, model, batches, written):
    """Each stage is finished, under one id."""
    trainer = Trainer(make_config(loggers=[ONLY_LOGGER], id="one"))
    trainer.fit(model, batches)
    trainer.test(model, batches, verbose=False)

    fit, test = written()
    assert (fit.id, test.id) == ("one", "one")
    assert "test/loss" in test.summary
    assert "test/loss" not in fit.summary


def test_run_left_open_by_another_trainer_is_not_used(make_config, model, batches, written):
    """A run that was opened again after training does not swallow the next trainer's metrics."""
    first = Trainer(make_config(loggers=[ONLY_LOGGER], id="first"))
    first.fit(model, batches)
    first.logger.experiment.log({"after": 1.0})

    Trainer(make_config(loggers=[ONLY_LOGGER], id="second")).fit(model, batches)

    assert [r.id for r in written()] == ["first", "first", "second"]
    assert written()[1].exit_code == 0
    assert "after" in written()[1].summary


def test_run_of_the_user_is_used_and_left_open(make_config, model, batches, written, project):
    """In a run that somebody else opened the metrics arrive, and finishing it is up to them."""
    import wandb

    with wandb.init(project="sweep", id="theirs", dir=project) as run:
        Trainer(make_config(loggers=[ONLY_LOGGER])).fit(model, batches)

        assert wandb.run is run
        run.log({"mine": 1.0})

    (one,) = written()
    assert one.id == "theirs"
    assert {"train/loss", "mine"} <= one.summary.keys()


def test_unreachable_server_keeps_the_run_offline(
    make_config, model, batches, written, monkeypatch, caplog
):
    """Without network training goes on, a warning says where the run is, and it is complete."""
    import wandb

    wandb.teardown()  # its settings are read once
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.delenv("WANDB_MODE")

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        Trainer(make_config(loggers=[ONLY_LOGGER], id="lost")).fit(model, batches)

    assert "wandb sync" in caplog.text
    assert any("train/loss" in r.summary and r.exit_code == 0 for r in written())


def test_disabled_wandb_leaves_nothing(make_config, model, batches, project, monkeypatch):
    """Switched off as a whole, W&B gets no files, no histograms and no checkpoints."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = {"name": "wandb", "watch": {"log": "all", "log_freq": 1}, "log_model": "all"}
    trainer = Trainer(make_config(loggers=[logger]))
    trainer.fit(model, batches)
    wandb.teardown()

    assert list(project.rglob("*.wandb")) == []
    assert trainer.loggers[0].describe_run() == {}


def test_without_a_key_the_run_is_offline(make_config, model, batches, project, monkeypatch):
    """Nobody is asked to log in."""
    import wandb

    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    Trainer(make_config(loggers=[ONLY_LOGGER])).fit(model, batches)
    wandb.teardown()

    (file,) = project.rglob("*.wandb")
    assert file.parent.name.startswith("offline-run-")


@pytest.mark.parametrize("log_model", ["latest", True, "none"])
def test_checkpoints_are_uploaded_as_asked(
    log_model, make_config, model, batches, written, project
):
    """`latest` uploads what is left at the end, even though the run is offline; `none` nothing."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    config = make_config(loggers=[{**ONLY_LOGGER, "log_model": log_model}])
    Trainer(config, callbacks=[ModelCheckpoint(dirpath=project / "c")]).fit(model, batches)

    (run,) = written()
    assert run.artifacts.get("model", []) == ([] if log_model == "none" else ["model.ckpt"])


def test_checkpoints_of_a_failed_run_are_uploaded(
    make_config, failing_model, batches, written, project
):
    """The last checkpoint of a run that failed is the one that is needed."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    config = make_config(loggers=[{**ONLY_LOGGER, "log_model": "latest"}])
    callbacks = [ModelCheckpoint(dirpath=project / "c", every_n_train_steps=1)]
    with pytest.raises(RuntimeError, match="the model failed"):
        Trainer(config, callbacks=callbacks).fit(failing_model, batches)

    (run,) = written()
    assert run.artifacts["model"] == ["model.ckpt"]
    assert run.exit_code == 1


def test_log_dir_prefix_and_project_are_followed(make_config, model, batches, written, project):
    """The files are in the folder, and the names as configured."""
    logger = {**ONLY_LOGGER, "log_dir": "elsewhere", "prefix": "x", "project": "p"}

    Trainer(make_config(loggers=[logger])).fit(model, batches)

    (run,) = written()
    assert run.project == "p"
    assert "x-train/loss" in run.summary
    assert list((project / "elsewhere").rglob("*.wandb"))


def test_fast_dev_run_opens_no_run(make_config, model, batches, project):
    """Lightning uses no logger then, and the companions do nothing."""
    config = make_config(loggers=[{"name": "wandb"}], fast_dev_run=True)

    Trainer(config).fit(model, batches)

    assert list(project.rglob("*.wandb")) == []
