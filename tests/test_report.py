"""`nshtrainer report` on a run of every family: checkpoints, skipped steps and averages are on the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.cli.app import app
from nshtrainer.testing import TinyDataModule, TinyModule
from nshtrainer_monitoring.report.checkpoints import Saved, read_checkpoints

pytestmark = pytest.mark.slow


def train(folder: Path, **fields: Any) -> Path:
    config = TrainerConfig.model_validate(
        {
            "id": "all",
            "directory": {"project_root": folder},
            "max_epochs": 3,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "primary_metric": {"name": "val_loss", "mode": "min"},
            "loggers": [{"name": "csv"}],
            "log_norms": {"log_grad_norm": True, "log_param_norm": True},
            "callbacks": [
                {"name": "ema", "decay": 0.9},
                {"name": "gradient_skipping", "threshold": 1e-9, "start_after_n_steps": 0},
                {"name": "epoch_timer"},
            ],
            **fields,
        }
    )
    trainer = Trainer(config)
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    return trainer.config.run.directory.root


def marked(root: Path) -> tuple[list[Saved], list[Saved]]:
    found = read_checkpoints(root)
    return [s for s in found if s.is_best], [s for s in found if s.is_last]


@pytest.mark.parametrize("links", ["symlink", "hardlink", "copy", "pointer", "none"])
def test_the_best_and_the_last_checkpoint_are_told(tmp_path: Path, links: str):
    """However links are made, or not: those that the callbacks themselves call best and last."""
    root = train(tmp_path, checkpoint_saving={"links": links})
    (best,), (last,) = marked(root)

    assert best.path.parent.name == "best_val_loss"
    assert best.metric == "val_loss"
    assert best.value is not None
    assert last.path.parent.name == "last"
    assert last.step == max(s.step or 0 for s in read_checkpoints(root))
    assert {s.state for s in read_checkpoints(root)} == {""}
    assert all(s.size == s.path.stat().st_size for s in read_checkpoints(root))


def test_a_page_has_what_every_family_leaves_behind(tmp_path: Path):
    """Sections of all, the options of their callbacks, and the place of the best checkpoint."""
    root = train(tmp_path)
    result = CliRunner().invoke(app, ["report", str(root)])
    assert result.exit_code == 0, result.output
    text = (root / "report.html").read_text(encoding="utf-8")

    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections[:5] == ["curves", "norms", "rates", "skips", "times"]
    assert "checkpoints" in sections
    assert '<span class="pill good">best</span>' in text
    assert '<g class="mark">' in text
    assert "<code>decay=0.9</code>" in text
    assert "<dt>skipped steps</dt><dd>12</dd>" in text
    assert "<dt>checkpoints</dt><dd>" in text


def test_a_checkpoint_that_is_not_whole_is_told(tmp_path: Path):
    """Cut off, without its file, without metadata, with damaged metadata: each is said, none is best."""
    root = train(tmp_path, max_epochs=1, checkpoint_saving={"links": "none"})
    first, second = read_checkpoints(root)[:2]
    first.path.write_bytes(first.path.read_bytes()[:100])
    second.path.unlink()
    (root / "checkpoint" / "mine.ckpt").write_bytes(b"1")
    (root / "checkpoint" / "bad.ckpt").write_bytes(b"1")
    (root / "checkpoint" / "bad.ckpt.metadata.json").write_text("{")

    states = {s.path.name: s.state for s in read_checkpoints(root)}

    assert states[first.path.name] in ("size differs", "file missing")
    assert {"size differs", "file missing", "no metadata", "metadata unreadable"} == set(
        states.values()
    )
    assert marked(root) == ([], [])


def test_an_evaluation_afterwards_is_no_step_and_no_epoch(tmp_path: Path):
    """It logs at the step after the last one, and the epoch of the checkpoint that it was of."""
    root = train(
        tmp_path, checkpoint_saving={"checkpoint_callbacks": [{"name": "last_checkpoint"}]}
    )
    config = TrainerConfig.from_file(root / "config.yaml")
    saved = [s for s in read_checkpoints(root) if s.step]
    trainer = Trainer(config)
    trainer.fit(TinyModule(), datamodule=TinyDataModule(), ckpt_path="last")
    trainer.validate(ckpt_path=str(saved[0].path), datamodule=TinyDataModule())
    CliRunner().invoke(app, ["report", str(root)])
    text = (root / "report.html").read_text(encoding="utf-8")

    assert f"<dt>steps</dt><dd>{saved[0].step}<" in text
    assert "<dt>epochs</dt><dd>3<" in text
