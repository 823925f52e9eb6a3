"""Totals of norms, counts of steps and throughput in Lightning's own progress bars."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

import nshtrainer
from nshtrainer import TrainerConfig, create_callbacks
from nshtrainer.testing import TinyDataModule, TinyModule, quiet_trainer_kwargs

BATCHES, EVERY = 10, 4
CALLBACKS = [
    {"name": "norm_logging", "log_grad_norm": True, "log_grad_norm_per_param": True},
    {"name": "gradient_skipping", "threshold": 1e-3, "start_after_n_steps": 0},
    {"name": "epoch_timer"},
]
SHOWN = {
    "train/grad_norm",
    "train/grad_2.0_norm_total",
    "train/grad_skipped_steps",
    "train/samples_per_s",
    "train/eta_s",
}


class Notes(Checkpoint):
    """Stands last; what was logged, and what the bar would draw, after each batch."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.logged: list[dict[str, float]] = []
        self.drawn: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.logged.append({n: float(v) for n, v in trainer.logged_metrics.items() if n in SHOWN})
        drawn = self.bar.get_metrics(trainer, pl_module)
        self.drawn.append({n: v for n, v in drawn.items() if n.startswith("train/")})


def make_trainer(kind: str, folder: Path, loggers: int, *callbacks: Any, shown: bool) -> pl.Trainer:
    ours = [{**callback, "prog_bar": shown} for callback in CALLBACKS]
    built = [CSVLogger(folder, name=f"{i}") for i in range(loggers)]
    options = {"enable_progress_bar": True, "log_every_n_steps": EVERY}
    if kind == "plain":
        options = quiet_trainer_kwargs(folder, logger=built, enable_checkpointing=True, **options)
        return pl.Trainer(**options, callbacks=[*create_callbacks(ours), *callbacks])
    options |= {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "loggers": [],
        "log_norms": None,
    }
    config = TrainerConfig.model_validate(
        {**options, "directory": {"project_root": folder}, "callbacks": ours}
    )
    trainer = nshtrainer.Trainer(config, callbacks=list(callbacks))
    trainer.loggers = built
    return trainer


@pytest.mark.parametrize("loggers", [0, 2])
@pytest.mark.parametrize("kind", ["ours", "plain"])
@pytest.mark.parametrize("name", ["tqdm", "rich"])
def test_they_are_shown_from_each_logging_step_to_the_next(name, kind, loggers, tmp_path, capsys):
    """Both of Lightning's bars, on our trainer and a plain one, with two loggers and with none."""
    screen = io.StringIO()
    console = {"file": screen, "force_terminal": True, "width": 400}
    bar = TQDMProgressBar() if name == "tqdm" else RichProgressBar(console_kwargs=console)
    notes = Notes(bar)
    trainer = make_trainer(kind, tmp_path, loggers, bar, notes, shown=True)

    trainer.fit(TinyModule(lr=1e-3), TinyDataModule(batches=BATCHES))

    assert [set(drawn) for drawn in notes.drawn] == [set()] * 3 + [SHOWN] * (BATCHES - 3)
    for batch in range(EVERY - 1, BATCHES):
        step = batch - (batch + 1) % EVERY
        assert notes.drawn[batch] == pytest.approx(notes.logged[step], rel=1e-6)
    assert notes.drawn[-1]["train/grad_skipped_steps"] == 8
    text = capsys.readouterr().out if name == "tqdm" else screen.getvalue()
    (last, *_) = reversed(re.findall(r"train/grad_norm[:=] ?([\d.e+-]+)", text))
    assert float(last) == pytest.approx(notes.drawn[-1]["train/grad_norm"], abs=0.01)
    assert "train/grad_skipped_steps" in text


def test_tqdm_draws_them_while_it_trains(tmp_path, capsys):
    """What the step before logged is on the screen at the next batch, and counts are whole numbers."""
    notes = Notes(bar := TQDMProgressBar())
    make_trainer("plain", tmp_path, 0, bar, notes, shown=True).fit(
        TinyModule(), TinyDataModule(batches=BATCHES)
    )

    frames = capsys.readouterr().out.split("\r")
    seen = {
        int(at[1]): count[1]
        for frame in frames
        if (at := re.search(rf" (\d+)/{BATCHES} ", frame))
        and (count := re.search(r"grad_skipped_steps=([\d.]+)", frame))
    }
    assert seen == {5: "4", 6: "4", 7: "4", 8: "4", 9: "8", 10: "8"}


def test_nothing_is_shown_unless_asked_for(tmp_path, capsys):
    """By default the bar is as Lightning leaves it."""
    notes = Notes(bar := TQDMProgressBar())
    trainer = make_trainer("plain", tmp_path, 1, bar, notes, shown=False)

    trainer.fit(TinyModule(), TinyDataModule(batches=BATCHES))

    assert trainer.progress_bar_metrics == {}
    assert "train/" not in capsys.readouterr().out
