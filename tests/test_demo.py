"""`nshtrainer demo` as people run it: a process of its own, in an empty folder."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nshtrainer import ConfigError, TrainerConfig
from nshtrainer.cli.app import app
from nshtrainer.demo.command import newest_run
from nshtrainer.demo.config import PROJECT, demo_config

pytestmark = pytest.mark.slow

TIMES = ("_time_s", "/eta_s", "_per_s")
"""How the names of metrics end that differ from run to run."""


@dataclass
class Demo:
    """A finished `nshtrainer demo`."""

    folder: Path
    status: int
    stdout: str
    stderr: str

    @property
    def run(self) -> Path:
        """The folder of the only run that there is."""
        (run,) = (p for p in (self.folder / "nshtrainer_logs").iterdir() if p.is_dir())
        return run

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of `metrics.csv`; what was not logged is left out."""
        (path,) = self.run.glob("log/csv/**/metrics.csv")
        with path.open(newline="") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def epochs(self, column: str) -> list[int]:
        """The epochs in whose rows *column* was logged, in the order of the file."""
        return [int(row["epoch"]) for row in self.rows if column in row]


def demo(folder: Path, *args: str, **environ: str) -> Demo:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NSHTRAINER", "PL_", "WANDB"))}
    done = subprocess.run(
        [sys.executable, "-m", "nshtrainer_cli", "demo", *args],
        cwd=folder, env={**kept, **environ},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    return Demo(folder, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once."""
    found = demo(tmp_path_factory.mktemp("demo"))
    assert found.status == 0, found.stderr
    return found


@pytest.fixture
def copied(finished: Demo, tmp_path: Path) -> Path:
    """A copy of the folder of the finished demo."""
    return shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True)


def test_reaches_97_percent(finished):
    """The network classifies at least 97 % of the held-out digits, last epoch and best one."""
    last = re.search(r"held-out images: ([\d.]+)%", finished.stdout)
    best = re.search(r"best checkpoint: ([\d.]+)%", finished.stdout)

    assert last is not None
    assert best is not None
    assert float(last[1]) >= 97.0
    assert float(best[1]) >= 97.0


def test_the_reloaded_best_checkpoint_has_its_recorded_score(finished):
    """The best checkpoint, read back and measured, has exactly the score that it was kept for."""
    assert "(the same, exactly)" in finished.stdout
    assert "NOT THE SAME" not in finished.stdout


def test_says_where_everything_is(finished):
    """Each place that the report lists exists."""
    listed = dict(re.findall(r"^  (\w+) +(\S+)$", finished.stdout, re.MULTILINE))

    assert set(listed) == {"metrics", "best", "last", "wandb", "config", "record"}
    assert [p for p in listed.values() if not (finished.run / p).exists()] == []


def test_logs_what_its_callbacks_measure(finished):
    """Accuracy, norms, learning rate, epoch, times and skipped steps are columns of `metrics.csv`."""
    columns = {name for row in finished.rows for name in row}

    assert columns >= {
        "step", "epoch", "computed_epoch", "train_loss", "val_loss", "val_acc", "lr-AdamW",
        "train/grad_norm", "train/param_norm", "train/epoch_time_s", "train/grad_skipped_steps",
    }  # fmt: skip
    assert all(math.isfinite(value) for row in finished.rows for value in row.values())


def test_each_epoch_is_validated_once(finished):
    """There is one row with a validation for each of the 15 epochs; the measuring after it adds one."""
    assert finished.epochs("val_acc")[:15] == list(range(15))


def test_is_recorded(finished):
    """Record and configuration are complete, and name the run."""
    record = json.loads((finished.run / "run.json").read_text())
    config = TrainerConfig.from_file(finished.run / "config.yaml")

    assert (record["id"], record["status"]) == (finished.run.name, "finished")
    assert config == demo_config()[0].replace(id=finished.run.name)


def test_is_quiet(finished):
    """No warning, no traceback, and nothing that has to be explained to a newcomer."""
    assert "Traceback" not in finished.stderr
    assert "warning" not in finished.stderr.lower()
    assert "deprecated" not in finished.stderr


def test_resuming_goes_on_in_the_same_run(copied):
    """`--resume` trains the missing epochs only, in the folder of the run, from its last checkpoint."""
    resumed = demo(copied, "--resume", "--epochs", "17")
    assert resumed.status == 0, resumed.stderr
    last = torch.load(resumed.run / "checkpoint" / "last.ckpt", weights_only=True)

    trained = [int(row["epoch"]) for row in resumed.rows if "train_loss" in row]
    assert trained == sorted(trained)
    assert {15, 16} <= set(trained)
    assert (last["epoch"], last["global_step"]) == (16, 17 * 44)
    assert "(the same, exactly)" in resumed.stdout


def test_resuming_a_finished_run_says_how_to_go_on(copied):
    """Without epochs left to train, one line says so and which command trains on."""
    resumed = demo(copied, "--resume")

    assert resumed.status == 1
    assert "the run has its 15 epochs already" in resumed.stderr
    assert "nshtrainer demo --resume --epochs 20" in resumed.stderr
    assert "Traceback" not in resumed.stderr


def test_a_written_configuration_gives_the_same_run(finished, tmp_path):
    """`--write-config`, then `--config`: the first epochs are the same to the last bit."""
    assert demo(tmp_path, "--write-config", "run.yaml").status == 0
    assert not (tmp_path / "nshtrainer_logs").exists()
    again = demo(tmp_path, "--config", "run.yaml", "--epochs", "2")
    assert again.status == 0, again.stderr

    def first_epochs(found: Demo) -> list[dict[str, float]]:
        steps = (row for row in found.rows if row["step"] < 2 * 44 and "val_acc" not in row)
        return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in steps]

    def accuracies(found: Demo) -> list[float]:
        return [row["val_acc"] for row in found.rows if "val_acc" in row][:2]

    assert again.run.name != finished.run.name
    assert len(first_epochs(again)) >= 8
    assert first_epochs(again) == first_epochs(finished)
    assert accuracies(again) == accuracies(finished)


def test_without_families_it_trains_and_says_what_is_left_out(tmp_path):
    """With the core alone it trains, logs and records; what it leaves out is named with the reason."""
    alone = demo(tmp_path, "--epochs", "1", NSHTRAINER_PLUGINS="")

    assert alone.status == 0, alone.stderr
    for name in ("ema", "checkpoint_saving", "norm_logging", "wandb"):
        assert re.search(rf"^left out: {name}: .*switched off", alone.stdout, re.MULTILINE)
    assert "best checkpoint" not in alone.stdout
    assert {"val_acc", "train_loss"} <= {name for row in alone.rows for name in row}
    assert not list(alone.run.rglob("*.ckpt"))


def test_with_one_family_less_the_others_work(tmp_path):
    """Without averaged weights and early stopping, checkpoints and norms are still there."""
    found = demo(tmp_path, "--epochs", "1", NSHTRAINER_DISABLE_PLUGINS="nshtrainer-ema")

    assert found.status == 0, found.stderr
    assert "left out: ema:" in found.stdout
    assert "left out: norm_logging" not in found.stdout
    assert "(the same, exactly)" in found.stdout
    assert found.epochs("train/grad_norm")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--resume",), "there is no run of the demo"),
        (("--config", "nowhere.yaml"), "there is no such file"),
        (("--config", "bad.yaml"), "did you mean 'max_epochs'"),
        (("--epochs", "0"), "Invalid value"),
    ],
)
def test_mistakes_are_one_line(tmp_path, args, expected):
    """What cannot be run is said in words, without a traceback, and nothing is written."""
    (tmp_path / "bad.yaml").write_text("max_epoch: 3\n")
    found = demo(tmp_path, *args)

    assert found.status != 0
    assert expected in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "nshtrainer_logs").exists()


# ---- two batches, in this process --------------------------------------------------------------


TINY = {
    "project": PROJECT, "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1,
    "log_every_n_steps": 1, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1,
    "enable_progress_bar": False, "enable_model_summary": False,
    "primary_metric": {"name": "val_acc", "mode": "max"},
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Run `nshtrainer demo ARGS` in an empty folder, with a file `tiny.yaml` that takes no time."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("WANDB_SILENT", "true")
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level

    def run(*args: str, **changes: object) -> Result:
        TrainerConfig.model_validate({**TINY, **changes}).to_file("tiny.yaml")
        return CliRunner().invoke(app, ["demo", *args])

    yield run
    lightning.setLevel(level)


def the_run(folder: Path) -> Path:
    (run,) = (p for p in (folder / "nshtrainer_logs").iterdir() if p.is_dir())
    return run


def test_resuming_from_another_folder_goes_on_where_the_run_lies(tiny, tmp_path, monkeypatch):
    """`--resume --dir` trains on from the last checkpoint and writes into the run that it found."""
    started = tiny("--config", "tiny.yaml")
    assert started.exit_code == 0, started.output
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    resumed = tiny("--resume", "--epochs", "2", "--dir", str(tmp_path / "here"))

    assert resumed.exit_code == 0, resumed.output
    assert not (elsewhere / "nshtrainer_logs").exists()
    last = torch.load(the_run(tmp_path / "here") / "checkpoint" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (1, 4)
    assert f"--dir {tmp_path / 'here'}" in resumed.stdout


@pytest.mark.parametrize("recorded", [None, "/moved/away"])
def test_a_found_run_goes_on_where_it_was_found(tmp_path, recorded):
    """Whatever place the record names, the run is the folder that the record was found in."""
    run = tmp_path / "nshtrainer_logs" / "found"
    config = {**TINY, "id": "other", "directory": {"project_root": recorded}}
    TrainerConfig.model_validate(config).to_file(run / "config.yaml")

    found = newest_run(tmp_path)

    assert (found.run.directory.root, found.ckpt_path) == (run, "last")


def test_resuming_without_a_checkpoint_is_refused(tiny, tmp_path):
    """Where there is nothing to go on from, nothing is trained and nothing is changed."""
    here = tmp_path / "here"
    assert tiny("--config", "tiny.yaml", checkpoint_saving=None).exit_code == 0
    before = {p: p.read_bytes() for p in the_run(here).rglob("*") if p.is_file()}

    for change in ("checkpoint_saving: null", "checkpoint_saving: {}"):
        record = the_run(here) / "config.yaml"
        text = re.sub(r"^checkpoint_saving:.*$", change, record.read_text(), flags=re.MULTILINE)
        before[record] = text.encode()
        record.write_text(text)
        resumed = tiny("--resume", "--epochs", "2")

        assert resumed.exit_code == 1
        assert "there is no checkpoint to go on from" in resumed.stderr
        assert {p: p.read_bytes() for p in the_run(here).rglob("*") if p.is_file()} == before


def test_the_folder_counts_for_a_configuration_from_a_file_too(tiny, tmp_path):
    """`--config FILE --dir FOLDER` writes into the folder."""
    done = tiny("--config", "tiny.yaml", "--dir", str(tmp_path / "there"))

    assert done.exit_code == 0, done.output
    assert (the_run(tmp_path / "there") / "run.json").is_file()
    assert not (tmp_path / "here" / "nshtrainer_logs").exists()


@pytest.mark.parametrize("option", ["--config", "--write-config"])
def test_resuming_excludes_another_configuration(tiny, option):
    """Options of which one would be ignored are a usage error."""
    refused = tiny("--resume", option, "tiny.yaml")

    assert refused.exit_code == 2
    assert f"so {option} does not go with it" in refused.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--dir", "file/x"), "is a file"),
        (("--dir", "/proc/x"), "/proc takes no files"),
        (("--write-config", "file/x.yaml"), "cannot be written"),
    ],
    ids=["file in the way", "unwritable", "unwritable file"],
)
def test_a_place_that_takes_no_files_is_one_line(tiny, args, said):
    """Where nothing can be written, that is said in words before anything is trained."""
    Path("file").write_text("in the way")

    refused = tiny(*args)

    assert refused.exit_code == 1
    assert isinstance(refused.exception, SystemExit)
    assert said in refused.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"primary_metric": None},
            "there is none, since the configuration has no `primary_metric`",
        ),
        (
            {"primary_metric": {"name": "val_loss", "mode": "min"}},
            r"val_loss ([\d.]+); reloaded and measured again: val_loss \1 \(the same, exactly\)",
        ),
        (
            {"limit_val_batches": 0, "primary_metric": {"name": "lr-AdamW", "mode": "min"}},
            r"lr-AdamW [\d.e-]+; validation does not measure 'lr-AdamW' again",
        ),
    ],
    ids=["no metric", "another metric", "not validated"],
)
def test_the_best_checkpoint_is_compared_by_its_own_metric(tiny, changes, said):
    """What is not comparable is not compared, and the reason is given."""
    done = tiny("--config", "tiny.yaml", **changes)

    assert done.exit_code == 0, done.output
    assert re.search(rf"^best checkpoint: {said}", done.stdout, re.MULTILINE)
    assert "NOT THE SAME" not in done.stdout
    assert "nan" not in done.stdout


BAREBONES = {**dict.fromkeys(TINY), "barebones": True, "max_epochs": 1, "limit_train_batches": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit_val_batches": 0, "primary_metric": None}, "`limit_val_batches: 0` switches"),
        ({"check_val_every_n_epoch": 2, "primary_metric": None}, "no validation was due"),
        ({**BAREBONES, "accelerator": "cpu"}, "`barebones` logs nothing"),
    ],
    ids=["no batches", "not due", "barebones"],
)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # barebones
def test_training_without_validation_is_not_called_nothing(tiny, changes, said):
    """A run that trained and measured no accuracy says so, and why."""
    done = tiny("--config", "tiny.yaml", **changes)

    assert done.exit_code == 0, done.output
    assert "accuracy: not known, since " in done.stdout
    assert said in done.stdout


def test_a_configuration_without_batches_is_told_from_a_finished_run(tiny):
    """Where a limit leaves nothing to train on, the limit is named."""
    done = tiny("--config", "tiny.yaml", limit_train_batches=0)

    assert done.exit_code == 1
    assert "leaves no batch to train on (max_epochs: 1, limit_train_batches: 0)" in done.stderr


def test_only_a_run_that_resuming_finds_is_offered_for_it(tiny):
    """A run of another project trains, but `--resume` does not look for it."""
    done = tiny("--config", "tiny.yaml", project="mine")

    assert "the same run:" in done.stdout
    assert "--resume" not in done.stdout
    with pytest.raises(ConfigError, match="there is no run of the demo"):
        newest_run(None)
