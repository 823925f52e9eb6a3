"""The CSV logger: a row for each step, and what an earlier session wrote stays."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nshtrainer import TrainerConfig
from nshtrainer.loggers.csv import CSVLoggerConfig
from nshtrainer.loggers.csv_logger import MergingCSVLogger


def logger(tmp_path: Path, **options) -> MergingCSVLogger:
    """A logger below *tmp_path*, as a configuration makes it."""
    config = TrainerConfig(
        id="r1", name="a b", directory={"project_root": tmp_path}, loggers=[], callbacks=[]
    )
    made = CSVLoggerConfig(**options).create_logger(config)
    assert isinstance(made, MergingCSVLogger)
    return made


def rows(tmp_path: Path) -> list[dict[str, str]]:
    """The rows of the only metrics file below *tmp_path*."""
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_logged_at_one_step_is_one_row(tmp_path: Path):
    """Also from several calls; tensors are written as numbers."""
    csv_logger = logger(tmp_path)
    csv_logger.log_metrics({"a": torch.tensor(1.5)}, step=0)
    csv_logger.log_metrics({"b": 2.0}, step=0)
    csv_logger.log_metrics({"a": 3.0}, step=1)
    csv_logger.finalize("success")

    assert rows(tmp_path) == [
        {"a": "1.5", "b": "2.0", "step": "0"},
        {"a": "3.0", "b": "", "step": "1"},
    ]


def test_a_metric_that_comes_later_gets_a_column(tmp_path: Path):
    """Rows that are in the file already are kept, with an empty cell."""
    csv_logger = logger(tmp_path)
    csv_logger.log_metrics({"b": 1.0}, step=0)
    csv_logger.finalize("success")
    csv_logger.log_metrics({"a": 2.0}, step=1)
    csv_logger.finalize("success")

    assert rows(tmp_path) == [
        {"a": "", "b": "1.0", "step": "0"},
        {"a": "2.0", "b": "", "step": "1"},
    ]


def test_a_second_session_of_a_run_appends(tmp_path: Path):
    """Lightning's own logger deletes the file of the first one."""
    for step in range(2):
        session = logger(tmp_path)
        session.log_metrics({"a": float(step)}, step=step)
        session.finalize("success")

    assert [row["step"] for row in rows(tmp_path)] == ["0", "1"]


def test_rows_are_written_when_there_are_many_and_the_last_may_grow(tmp_path: Path):
    """`flush_logs_every_n_steps` rows are kept at most; the newest one waits for its other metrics."""
    csv_logger = logger(tmp_path, flush_logs_every_n_steps=2)
    for step in range(3):
        csv_logger.log_metrics({"a": 1.0}, step=step)
        csv_logger.save()
    before = [row["step"] for row in rows(tmp_path)]
    csv_logger.log_metrics({"b": 2.0}, step=2)
    csv_logger.finalize("failed")

    assert before == ["0", "1"]
    assert rows(tmp_path)[2] == {"a": "1.0", "b": "2.0", "step": "2"}


@pytest.mark.parametrize("value", ["a,b", 'a"b', "a\nb"])
def test_odd_names_of_metrics_stay_one_column(tmp_path: Path, value: str):
    """Commas, quotes and line breaks are quoted."""
    csv_logger = logger(tmp_path)
    csv_logger.log_metrics({value: 1.0}, step=0)
    csv_logger.finalize("success")

    assert rows(tmp_path) == [{value: "1.0", "step": "0"}]


def test_the_place_is_below_the_run_and_made_at_the_first_record(tmp_path: Path):
    """Building a trainer writes nothing; `log_dir` puts the files elsewhere, `prefix` names them."""
    csv_logger = logger(tmp_path)
    nothing = not list(tmp_path.iterdir())
    csv_logger.log_metrics({"a": 1.0}, step=0)
    csv_logger.finalize("success")
    elsewhere = logger(tmp_path / "unused", log_dir=tmp_path / "other", prefix="p")
    elsewhere.log_metrics({"a": 1.0}, step=0)
    elsewhere.finalize("success")

    assert nothing
    (path,) = (tmp_path / "nshtrainer_logs").rglob("metrics.csv")
    assert path.relative_to(tmp_path).parts[-4:] == ("csv", "a b", "r1", "metrics.csv")
    (other,) = (tmp_path / "other").rglob("metrics.csv")
    assert other.read_text().splitlines()[0] == "p-a,step"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
@pytest.mark.parametrize(
    "name", ["..", "../../..", "/x/y", "a" * 400, "\N{GRINNING FACE}" * 200, "con", "a\nb", " . "]
)
def test_a_name_never_leads_out_of_the_runs_folder(tmp_path: Path, name: str, kind: str):
    """Whatever a person calls a run, it is one folder of a length that every system takes."""
    pytest.importorskip(kind, reason="the extra tensorboard is not installed")
    run = {"id": "r1", "name": name, "directory": {"project_root": tmp_path}, "callbacks": []}
    config = TrainerConfig.model_validate({**run, "loggers": [{"name": kind}]})
    made = config.loggers[0].create_logger(config)
    assert made is not None
    made.log_metrics({"a": 1.0}, step=0)
    made.finalize("success")

    written = {p.parent for p in tmp_path.rglob("*") if p.is_file()}
    assert written
    below = config.run.directory.root / "log" / kind
    for folder in written:
        between, last = folder.relative_to(below).parts
        assert last == "r1"
        assert between not in (".", "..", "con")
        assert len(between.encode()) <= 120


@pytest.mark.parametrize("bad", [0, -1, True, "5", 1.5])
def test_a_number_of_rows_that_is_none_is_refused(bad: object):
    """When the configuration is made."""
    with pytest.raises(ValueError, match="flush_logs_every_n_steps"):
        CSVLoggerConfig(flush_logs_every_n_steps=bad)


def damaged(tmp_path: Path, change: Callable[[str], str], *, steps: int = 3) -> MergingCSVLogger:
    """A new session of a run whose log somebody has edited in between."""
    first = logger(tmp_path)
    for step in range(steps):
        first.log_metrics({"a": float(step)}, step=step)
    first.finalize("success")
    (path,) = tmp_path.rglob("metrics.csv")
    path.write_bytes(change(path.read_text()).encode("latin-1"))
    return logger(tmp_path)


def test_rows_without_a_number_for_a_step_stay_and_are_counted(tmp_path: Path, caplog):
    """An edited log neither ends a resumed run nor loses a row; what an editor rounds is understood."""

    def edit(text: str) -> str:
        return text.replace("1.0,1", "1.0,one").replace("0.0,0", "0.0,0.0") + "7.0,\n"

    session = damaged(tmp_path, edit, steps=4)
    session.rewind(3)
    session.log_metrics({"b": 1.0}, step=2)
    session.log_metrics({"a": 9.0}, step=3)
    session.finalize("success")

    assert [(row["a"], row["step"]) for row in rows(tmp_path)] == [
        ("0.0", "0"),
        ("1.0", "one"),
        ("7.0", ""),
        ("2.0", "2"),
        ("9.0", "3"),
    ]
    assert rows(tmp_path)[3]["b"] == "1.0"
    assert "2 rows of" in caplog.text
    assert "the first one 'one'" in caplog.text


def test_cells_beyond_the_last_column_do_not_end_a_run(tmp_path: Path):
    """They have no name; the rest of their row stays."""
    session = damaged(tmp_path, lambda text: text.replace("0.0,0", "0.0,0,a note"))
    session.rewind(2)
    session.log_metrics({"b": 1.0}, step=2)
    session.finalize("success")

    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text + '"' + "x" * 200_000 + "\n", "is no CSV (field larger"),
        (lambda text: text.replace("0.0,0", "\xe9,0"), "is no CSV ("),
        (lambda text: text.replace("step", "time"), "has no column 'step'"),
    ],
    ids=["an open quote", "another encoding", "no step"],
)
def test_a_file_that_is_no_log_is_kept_beside_a_new_one(tmp_path: Path, caplog, change, problem):
    """A run that is resumed logs into a new file, and says where the old one is."""
    session = damaged(tmp_path, change)
    session.rewind(3)
    session.log_metrics({"a": 9.0}, step=3)
    session.finalize("success")

    assert [(row["a"], row["step"]) for row in rows(tmp_path)] == [("9.0", "3")]
    (aside,) = tmp_path.rglob("metrics-damaged-*.csv")
    assert "2.0,2" in aside.read_bytes().decode("latin-1")
    assert problem in caplog.text
