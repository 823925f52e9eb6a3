from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nshtrainer import Trainer

from .secrets import BY_CONTENT

pytestmark = [
    pytest.mark.slow,  # a W&B run takes half a second to open
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning with new torch
]


def _logger(**code):
    return {"name": "wandb", "watch": None, "log_code": code}


def test_code_is_in_the_run(make_config, model, batches, written, project: Path):
    """The source files are an artifact of the run, by their paths; secrets are not."""
    (project / "pkg").mkdir()
    for path in ("train.py", "pkg/model.py", ".env", "data.bin"):
        (project / path).write_text("x = 1\n")

    Trainer(make_config(loggers=[_logger()])).fit(model, batches)

    (run,) = written()
    assert sorted(run.artifacts["code"]) == ["pkg/model.py", "train.py"]


def test_code_is_uploaded_once_for_a_run(make_config, model, batches, written, project: Path):
    """Validating and fitting again with one trainer uploads nothing more."""
    (project / "train.py").write_text("x = 1\n")
    trainer = Trainer(make_config(loggers=[_logger()]))

    trainer.fit(model, batches)
    trainer.test(model, batches, verbose=False)

    assert [run.artifacts.get("code") for run in written()] == [["train.py"], None]


def test_given_directory_is_uploaded(make_config, model, batches, written, tmp_path: Path):
    """`directory` names what is uploaded instead of the project."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.py").write_text("x = 1\n")

    config = make_config(loggers=[_logger(directory=str(tmp_path / "other"), exclude=["b*"])])
    Trainer(config).fit(model, batches)

    (run,) = written()
    assert run.artifacts["code"] == ["a.py"]


def test_failure_to_collect_does_not_fail_the_run(make_config, model, batches, project, caplog):
    """A repository that git cannot read is a warning, and training goes on."""
    (project / ".git").write_text("gitdir: /nowhere\n")
    trainer = Trainer(make_config(loggers=[_logger()]))

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        trainer.fit(model, batches)

    assert "git cannot list" in caplog.text
    assert trainer.global_step == 4


def test_without_wandb_logger_the_user_is_told(make_config, model, batches, caplog):
    """The callback alone has nowhere to upload to, and says so."""
    trainer = Trainer(make_config(callbacks=[{"name": "wandb_upload_code"}]))

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        trainer.fit(model, batches)

    assert "no W&B logger" in caplog.text


def test_secrets_are_named_in_the_log(make_config, model, batches, written, project: Path, caplog):
    """What is left out in error is seen without looking for it, with how to see the rest."""
    (project / "train.py").write_text("x = 1\n")
    for number in range(7):
        (project / f"call{number}.py").write_text(BY_CONTENT["github"])

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        Trainer(make_config(loggers=[_logger()])).fit(model, batches)

    assert "7 files look like secrets" in caplog.text
    assert "call0.py (it holds a GitHub token)" in caplog.text
    assert "nshtrainer wandb code" in caplog.text
    (run,) = written()
    assert run.artifacts["code"] == ["train.py"]
