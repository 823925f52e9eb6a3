"""`nshtrainer report` on real runs: the page, the terminal, comparisons, and what it says when it cannot."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.cli.app import app
from nshtrainer_monitoring.report.run import read_run

EVIL = "<script>alert('x')</script>&\"'"
VOID = {"meta", "link", "br", "path", "rect"}


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.opened: list[str] = []
        self.count: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.opened == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.opened.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] not in ("style", "script"):
            self.text += data

    @property
    def sections(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("section", "id")]

    @property
    def curves(self) -> list[str]:
        return [value for tag, name, value in self.attributes if name == "data-label"]


def report(*args: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, args)])


def page_of(*args: object) -> Page:
    """The page about the run that is named first."""
    result = report(*args)
    assert result.exit_code == 0, result.output
    path = Path(re.search(r"wrote (.*)", result.stderr)[1])
    return Page(path.read_text(encoding="utf-8"))


def config(root: Path, run_id: str, **fields: Any) -> TrainerConfig:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return TrainerConfig.model_validate(
        {
            "id": run_id,
            "name": ["tiny", run_id],
            "directory": {"project_root": root},
            "primary_metric": {"name": "val/loss", "mode": "min"},
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "checkpoint_saving": None,
            "loggers": [{"name": "csv"}],
            "log_norms": {"log_grad_norm": True, "log_grad_norm_per_param": True},
            "callbacks": [{"name": "epoch_timer"}],
            **quiet,
            **fields,
        }
    )


@pytest.fixture
def train(net, tmp_path):
    """Train for real, and return the run's folder."""

    def go(run_id: str = "one", *callbacks: Any, logs: Any = None, **fields: Any) -> Path:
        chosen = config(tmp_path, run_id, **fields)
        trainer = Trainer(chosen, callbacks=list(callbacks))
        trainer.fit(net(logs=logs))
        return trainer.config.run.directory.root

    return go


# ---- the page ----------------------------------------------------------------------------------


def test_a_run_becomes_one_page_that_loads_nothing(train):
    """Curves, norms, learning rate, time, values, configuration and environment, in one file."""
    root = train()
    page = page_of(root)

    assert (root / "report.html").is_file()
    assert page.sections[:4] == ["curves", "norms", "rates", "times"]
    assert {"more", "values", "configuration", "environment"} <= set(page.sections)
    assert {"train", "val", "train/grad_norm".removeprefix("train/"), "lr-SGD"} <= set(page.curves)
    assert "first.weight" in page.curves  # a single parameter
    assert "finished" in page.text
    assert "tiny" in page.text
    assert "epoch_timer" in page.text
    assert "nshtrainer-monitoring" in page.text
    outside = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("#", "data:,")) for value in outside)
    raw = (root / "report.html").read_text(encoding="utf-8")
    assert "url(" not in raw
    assert "@import" not in raw
    assert "://" not in raw.replace("http://www.w3.org/2000/svg", "")
    assert page.count["script"] == 1


def test_values_on_the_page_are_those_that_were_logged(train):
    """Last, least and greatest of a metric, from a run whose numbers are known."""

    class Known(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            pl_module.log("known", float([5, 3, 8, math.nan, 4, 6][batch_idx]))

    root = train("one", Known(), max_epochs=1)
    page_of(root)

    text = (root / "report.html").read_text(encoding="utf-8")
    row = re.search(r"<tr><td>known</td>(.*?)</tr>", text)[1]
    # last, least and its step, greatest and its step, values, not finite
    assert re.findall(r">([^<>]+)<", row) == ["6", "3", "1", "8", "2", "6", "1"]


def test_a_run_is_reported_while_it_goes_on(train):
    """At the end of an epoch the page can be made; it says that the run is running, and is no file of it."""
    seen: list[Page] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                for logger in trainer.loggers:
                    logger.save()
                root = trainer.config.run.directory.root
                seen.append(page_of(root, "--output", root.parent / "now.html"))

    train("one", Look(), loggers=[{"name": "csv", "flush_logs_every_n_steps": 1}])

    (page,) = seen
    assert "running" in page.text
    assert "train" in page.curves


def test_a_resumed_run_shows_each_step_once(train, tmp_path):
    """Killed in the second epoch and resumed from the end of the first: one ascending curve, no step lost."""
    saved = tmp_path / "saved.ckpt"

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(saved)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power failure"):
        train("one", Stop())
    stopped = page_of(tmp_path / "nshtrainer_logs" / "one")
    root = train("one", ckpt_path=str(saved))
    page = page_of(root)

    assert "stopped by RuntimeError" in stopped.text
    assert "finished" in page.text
    steps = list(read_run(root).metrics.series["train/loss"].xs)
    assert steps == [float(step) for step in range(18)]


def test_a_run_of_a_plain_lightning_trainer_has_a_report_too(net, make_trainer, tmp_path):
    """Only `lightning_logs/version_0/metrics.csv` is there; the page says what is not."""
    trainer = make_trainer(logger=CSVLogger(tmp_path), max_epochs=2)
    trainer.fit(net())

    page = page_of(tmp_path)

    assert (tmp_path / "lightning_logs" / "version_0" / "report.html").is_file()
    assert {"train", "val"} <= set(page.curves)
    assert "there is no run.json" in page.text


def test_text_of_a_run_is_never_markup(train):
    """A metric, a name, a note and a status that are HTML: all of it is text, and one script is ours."""
    root = train(
        "one",
        name=[EVIL],
        tags=[EVIL],
        meta={EVIL: EVIL},
        logs={"training_step": ["train/" + EVIL, EVIL], "validation_step": ["val/loss"]},
    )
    record = json.loads((root / "run.json").read_text())
    record["status"] = EVIL
    record["plugins"][EVIL] = EVIL
    record["environment"]["hostname"] = EVIL + "\ud800\x00"
    (root / "run.json").write_text(json.dumps(record))

    page = page_of(root)

    assert page.count["script"] == 1
    assert page.text.count(EVIL) >= 6
    assert EVIL in page.curves
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert EVIL[:20] in report(root, "--terminal").stdout


def test_secrets_stay_out(train):
    """What the record redacted is shown as such, and what a plain logger wrote down is redacted now."""
    root = train("one", meta={"api_key": "sk-very-secret-0123456789", "lr": 0.1})
    (root / "config.yaml").unlink()
    hparams = next(root.glob("log/csv/**/hparams.yaml"))
    hparams.write_text(hparams.read_text() + "\npassword: hunter2hunter2\n")

    page_of(root)

    text = (root / "report.html").read_text(encoding="utf-8")
    assert "very-secret" not in text
    assert "hunter2" not in text
    assert "[redacted]" in text


@pytest.mark.parametrize(
    "missing", ["run.json", "config.yaml", "log", "checkpoint", "run.json config.yaml"]
)
def test_missing_files_leave_gaps_and_no_error(train, missing):
    """Whatever part of a run was deleted, the rest is shown."""
    root = train(max_epochs=1)
    for name in missing.split():
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    page = page_of(root)

    assert ("curves" in page.sections) == (missing != "log")
    assert ("configuration" in page.sections) is True
    assert missing in ("checkpoint", "config.yaml") or "there is no" in page.text


@pytest.mark.parametrize(
    "damage",
    [("run.json", "{"), ("run.json", "[1]"), ("config.yaml", "a: [1"), ("config.yaml", "- 1")],
    ids=" ".join,
)
def test_damaged_files_are_said_and_survived(train, damage):
    """Half a file, or another kind of content."""
    root = train(max_epochs=1)
    (root / damage[0]).write_text(damage[1])

    assert {"curves", "values"} <= set(page_of(root).sections)


def test_a_run_without_metrics_still_has_a_page(train):
    """Killed before anything was logged: the configuration and the reason."""
    root = train(max_epochs=1)
    for path in root.glob("log/csv/**/metrics.csv"):
        path.write_text("")
    page = page_of(root)

    assert "curves" not in page.sections
    assert "configuration" in page.sections
    assert report(root, "--terminal").exit_code == 0


def test_hundreds_of_metrics_are_folded_and_the_page_stays_small(train):
    """300 norms over 5,000 steps: drawn small, folded away, and thinned to what a screen shows."""
    root = train(max_epochs=1)
    path = next(root.glob("log/csv/**/metrics.csv"))
    names = [f"train/grad_2.0_norm/layers.{i}.weight" for i in range(300)]
    rows = (
        f"{step}," + ",".join(f"{1 + math.sin(step * (i + 1)):.6f}" for i in range(300))
        for step in range(1000)
    )
    path.write_text(f"step,{','.join(names)}\n" + "\n".join(rows) + "\n")

    page = page_of(root)

    assert page.count["details"] >= 1
    assert len(page.curves) == 300
    assert (root / "report.html").stat().st_size < 6_000_000


# ---- which run ---------------------------------------------------------------------------------


def test_of_several_runs_the_newest_is_taken_and_named(train, tmp_path, monkeypatch):
    """By a folder of runs, by the project's folder, and without any."""
    old, new = train("older", max_epochs=1), train("newer", max_epochs=1)
    for path in [old, *old.rglob("*")]:
        os.utime(path, (1, 1), follow_symlinks=False)
    monkeypatch.chdir(tmp_path)

    for args in ([new.parent], [tmp_path], []):
        result = report(*args, "--output", tmp_path / "page.html")
        assert result.exit_code == 0, result.output
        assert "has 2 runs; the newest is newer" in result.stderr
        assert "tiny-newer" in (tmp_path / "page.html").read_text() or "newer" in result.stderr


def test_a_place_that_is_no_run_is_a_wrong_command_line(tmp_path, monkeypatch):
    """Exit status 2, what was found there, and what to give."""
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    for args, said in [
        ([tmp_path / "none"], "does not exist; give the folder of a run"),
        ([file], "is a file; give the folder of a run"),
        ([tmp_path / "empty"], "is no run and holds none; give the folder of a run"),
        ([], "there is no nshtrainer_logs in"),
        (["s3://bucket/run"], "is a URL"),
        ([file, file], "nshtrainer report"),
    ]:
        result = report(*args)
        assert result.exit_code == 2, (args, result.output)
        assert said in result.stderr
        assert "Traceback" not in result.stderr


def test_a_page_that_cannot_be_written_is_an_error(train, tmp_path):
    """A file stands where a folder is needed; nothing else is touched."""
    root = train(max_epochs=1)
    (tmp_path / "file").write_text("mine")

    result = report(root, "--output", tmp_path / "file" / "page.html")

    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


# ---- several runs ------------------------------------------------------------------------------


def test_runs_are_laid_over_one_another_with_what_differs(train):
    """Each run is a curve of every metric; only differing settings are listed."""
    first = train("a", max_epochs=2, gradient_clip_val=1.0)
    second = train("b", max_epochs=3, callbacks=[{"name": "finite_checks"}])
    third = train("c", max_epochs=2)
    page = page_of(first, "--compare", second, third)

    assert (first / "compare.html").is_file()
    titles = [json.loads((r / "run.json").read_text())["name"] for r in (first, second, third)]
    assert {f"{t} train" for t in titles} | {f"{t} val" for t in titles} <= set(page.curves)
    for setting in ("max_epochs", "gradient_clip_val", "callbacks[finite_checks]"):
        assert setting in page.text
    assert "log_every_n_steps" not in page.text
    assert page.count["script"] == 1


def test_a_run_is_not_compared_with_itself(train):
    """By whatever path."""
    root = train(max_epochs=1)
    result = report(root, "--compare", root / ".." / root.name)

    assert result.exit_code == 2
    assert "twice" in result.stderr


# ---- terminal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_curves_as_text_fit_a_terminal_of_80_columns(train, encoding):
    """Without a page, without colours in a pipe, and in ASCII where there is nothing else."""
    root = train(
        logs={"training_step": ["train/löss", "train/acc"], "validation_step": ["val/löss"]}
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "nshtrainer_cli", "report", str(root), "--terminal"],
        capture_output=True, check=True, env=environment,
    )  # fmt: skip

    text = done.stdout.decode(encoding)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "finished" in text
    assert "\x1b" not in text
    assert not (root / "report.html").exists()
    drawn = [line.lstrip(" 0123456789.e-") for line in lines]
    marks = {c for line in drawn if line.startswith(("|", "│")) for c in line}
    assert {".", "o"} <= marks  # two curves in one plot and no colours: a mark for each
    if encoding == "ascii":
        assert any("l?ss" in line for line in lines)
    else:
        assert any(0x2800 < ord(c) < 0x2900 for c in text)


def test_terminal_and_page_at_once(train, tmp_path):
    """`--output` writes the page too."""
    root = train(max_epochs=1)
    result = report(root, "--terminal", "--output", tmp_path / "page.html")

    assert "train" in result.stdout
    assert (tmp_path / "page.html").is_file()


def test_a_name_cannot_move_the_cursor(train):
    """Escape sequences in a metric's name are not sent to the terminal."""
    root = train(logs={"training_step": ["\x1b[2Jloss\x07"], "validation_step": []})

    assert "\x1b" not in report(root, "--terminal").stdout
    assert "\x1b" not in (root / "report.html" if page_of(root) else root).read_text()


# ---- cost --------------------------------------------------------------------------------------


def test_a_report_costs_no_torch(train):
    """Neither the command nor its page or text imports what trains or computes."""
    root = train(max_epochs=1)
    code = (
        "import sys; from nshtrainer_cli import main\n"
        "for args in (['report', sys.argv[1]], ['report', sys.argv[1], '--terminal'], ['--help']):\n"
        "    try: main(args)\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = ('torch', 'lightning', 'numpy', 'pandas', 'rich', 'wandb')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "[]"
    assert "report  " in done.stdout


def test_the_same_files_give_the_same_page(train, tmp_path):
    """So that a report can be compared with an earlier one."""
    root = train(max_epochs=1)
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for path in pages:
        assert report(root, "--output", path).exit_code == 0

    assert pages[0].read_bytes() == pages[1].read_bytes()
