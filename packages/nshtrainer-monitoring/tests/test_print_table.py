from __future__ import annotations

import builtins
import re
import sys
from types import ModuleType

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)

from nshtrainer import MetricConfig, create_callbacks
from nshtrainer_monitoring import (
    MetricValidationCallback,
    PrintTableMetricsCallback,
    PrintTableMetricsCallbackConfig,
)
from nshtrainer_monitoring.print_table.layout import (
    Cell,
    Layout,
    cells_of,
    format_change,
    format_value,
)
from nshtrainer_monitoring.print_table.rendering import as_html, as_plain_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (3.0, "3"),
        (0.5, "0.5"),
        (1 / 3, "0.33333"),
        (-1.23456789e-12, "-1.235e-12"),
        (1e300, "1.000e+300"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_fit_their_column(value, text):
    """Any number takes at most ten characters."""
    assert format_value(value) == text
    assert len(text) <= 10


@pytest.mark.parametrize(
    ("value", "before", "text"),
    [
        (1.5, 2.0, "-0.5"),
        (2.0, 1.99999, "+1e-05"),
        (1e-99, -1.2e-99, "+2.2e-99"),
        (1.5e-150, 0.3e-150, "+1e-150"),
        (1.0, 1.0, ""),
        (1.0, None, ""),
        (float("nan"), 1.0, ""),
        (float("inf"), 1.0, ""),
    ],
)
def test_changes_fit_behind_their_number(value, before, text):
    """A signed difference takes at most eight characters; where there is none, nothing is shown."""
    assert format_change(value, before) == text
    assert len(text) <= 8


def test_columns_are_found_by_name():
    """A missing value leaves its column empty instead of moving the others."""
    names = ["epoch", "a_long_metric_name", "b"]
    cells = {"epoch": Cell("1"), "b": Cell("2.5", is_best=True, change="+0.1")}
    header, row = as_plain_text(Layout(names), cells, with_header=True).splitlines()

    assert header.split() == names
    assert row.split() == ["1", "-", "2.5*", "+0.1"]
    assert row.index("2.5") + 3 == header.index("b") + 1


def test_narrow_terminals_get_several_blocks():
    """What does not fit is continued below, never cut; a column wider than the line stands alone."""
    names = ["epoch", "aaaa", "bbbb", "c" * 40, "dddd"]
    layout = Layout(names, width=45)

    assert layout.blocks() == [names[:2], names[2:3], names[3:4], names[4:]]
    text = as_plain_text(layout, dict.fromkeys(names, Cell("1")), with_header=True)
    assert all(len(line) <= 45 for line in text.splitlines())


LOSS = MetricConfig(name="loss", mode="min")


def test_a_cell_says_what_is_best_and_better():
    """A value is best if it beats all before it, better if it beats the one before it."""
    directions = {"loss": LOSS, "acc": MetricConfig(name="acc", mode="max")}
    row = {"epoch": 3, "step": 9, "loss": 0.5, "acc": 0.6, "unknown": 2.0}
    before = {"epoch": 2, "step": 6, "loss": 0.75, "acc": 0.7, "unknown": 1.0}
    best = {"loss": 0.25, "acc": 0.5}

    assert cells_of(row, before, best, directions) == {
        "epoch": Cell("3"),
        "step": Cell("9"),
        "loss": Cell("0.5", is_best=False, change="-0.25", is_better=True),
        "acc": Cell("0.6", is_best=True, change="-0.1", is_better=False),
        "unknown": Cell("2", change="+1"),
    }


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_what_is_not_better_is_not_best(value):
    """NaN, and what equals the best, get no mark."""
    cells = cells_of({"loss": value}, {}, {"loss": 0.5}, {"loss": LOSS})

    assert not cells["loss"].is_best


def scripted(net, *values):
    """A module that logs one of *values* as `val/x` at the end of each validation."""

    class Scripted(net):
        def on_validation_epoch_end(self):
            self.log("val/x", float(values[self.current_epoch]))

    return Scripted()


def marks(capsys):
    """Of each printed row, the words behind epoch and step."""
    return [line[2:] for line in lines(capsys) if line[0] != "epoch"]


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_one_row_per_validation(net, make_trainer, capsys):
    """Each validation adds one row under one header; the sanity check adds none."""
    trainer = make_trainer(
        PrintTableMetricsCallback(metric_patterns=["val/*"]), num_sanity_val_steps=1, max_epochs=3
    )

    trainer.fit(net())

    printed = lines(capsys)
    assert printed[0] == ["epoch", "step", "val/loss"]
    assert [row[:2] for row in printed[1:]] == [["0", "6"], ["1", "12"], ["2", "18"]]
    assert float(printed[-1][2]) == pytest.approx(
        trainer.callback_metrics["val/loss"].item(), rel=1e-4
    )


def test_later_metrics_get_their_own_column(net, make_trainer, capsys):
    """A metric that appears later comes on the right, under its own name, with a new header."""

    class Growing(net):
        def on_validation_epoch_end(self):
            if self.current_epoch == 1:
                self.log("a_first_by_name", 5.0)

    trainer = make_trainer(
        PrintTableMetricsCallback(metric_patterns=["val/*", "a_*"]), max_epochs=2
    )

    trainer.fit(Growing())

    first, _, second, row = lines(capsys)
    assert first == ["epoch", "step", "val/loss"]
    assert second == ["epoch", "step", "val/loss", "a_first_by_name"]
    assert row[-1] == "5"


@pytest.mark.parametrize(
    ("patterns", "shown"),
    [
        (None, {"val/loss", "VAL/x"}),
        (["val/*"], {"val/loss"}),
        (["*x", "*s"], {"val/loss", "VAL/x"}),
    ],
)
def test_patterns_choose_the_metrics(net, make_trainer, capsys, patterns, shown):
    """Metrics that fit no pattern are left out; patterns are case-sensitive."""
    module = net(logs={"validation_step": ["val/loss", "VAL/x"]})
    trainer = make_trainer(PrintTableMetricsCallback(metric_patterns=patterns))

    trainer.fit(module)

    assert set(lines(capsys)[0]) == {"epoch", "step"} | shown


def test_validate_prints_too_and_disabled_does_not(net, make_trainer, capsys):
    """A validation outside of fit is shown; enabled=False, by hand, shows nothing."""
    make_trainer(PrintTableMetricsCallback()).validate(net(), verbose=False)
    assert len(lines(capsys)) == 2

    make_trainer(PrintTableMetricsCallback(enabled=False)).fit(net())
    assert lines(capsys) == []


def make_bar(kind):
    return {
        "tqdm": TQDMProgressBar,
        "rich": RichProgressBar,
        "silent": lambda: TQDMProgressBar(refresh_rate=0),
    }[kind]()


@pytest.mark.parametrize("bar", ["tqdm", "rich", "silent"])
def test_a_progress_bar_does_not_swallow_rows(net, make_trainer, capsys, bar):
    """Rows are printed through the bar, or past one that is switched off."""
    trainer = make_trainer(
        PrintTableMetricsCallback(metric_patterns=["val/*"]),
        make_bar(bar),
        enable_progress_bar=True,
        max_epochs=2,
    )

    trainer.fit(net())

    # Bars move the cursor, so a row need not begin its line.
    assert len(re.findall(r"(?:0 +6|1 +12) +0\.\d+", capsys.readouterr().out)) == 2


@pytest.mark.parametrize("bar", ["tqdm", "rich", "silent"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_closed_bar_does_not_swallow_rows(net, make_trainer, capsys, bar, reverse):
    """Outside of fit a bar may already be closed when the row is printed."""
    callbacks = [PrintTableMetricsCallback(metric_patterns=["val/*"]), make_bar(bar)]
    trainer = make_trainer(
        *(reversed(callbacks) if reverse else callbacks), enable_progress_bar=True
    )

    trainer.validate(net(), verbose=False)

    assert len(re.findall(r"0 +0 +0\.\d+", capsys.readouterr().out)) == 1


def monitored_by(path, kind):
    """What says that `val/x` gets better upwards."""
    x = MetricConfig(name="val/x", mode="max")
    return {
        "metrics": lambda: [PrintTableMetricsCallback(metrics=[x], metric_patterns=["val/x"])],
        "primary_metric": lambda: create_callbacks(
            [PrintTableMetricsCallbackConfig(metric_patterns=["val/x"])], primary_metric=x
        ),
        "early_stopping": lambda: [
            PrintTableMetricsCallback(metric_patterns=["val/x"]),
            EarlyStopping("val/x", mode="max", verbose=False, patience=9),
        ],
        "checkpoint": lambda: [
            PrintTableMetricsCallback(metric_patterns=["val/x"]),
            ModelCheckpoint(path, monitor="val/x", mode="max"),
        ],
        "metric_validation": lambda: [
            PrintTableMetricsCallback(metric_patterns=["val/x"]),
            MetricValidationCallback(metrics=[x]),
        ],
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["metrics", "primary_metric", "early_stopping", "checkpoint", "metric_validation"]
)
def test_best_values_are_marked(net, make_trainer, capsys, tmp_path, kind):
    """Whoever says which direction is better: what beats all rows before it has a star."""
    callbacks = monitored_by(tmp_path, kind)
    options = {"enable_checkpointing": kind == "checkpoint"}
    trainer = make_trainer(*callbacks, max_epochs=4, **options)

    trainer.fit(scripted(net, 1, 2, 1.5, 2.5))

    assert marks(capsys) == [["1*"], ["2*", "+1"], ["1.5", "-0.5"], ["2.5*", "+1"]]
    assert callbacks[0].best == {"val/x": 2.5}


def test_a_plateau_scheduler_says_what_is_better(net, make_trainer, capsys):
    """What `ReduceLROnPlateau` waits for has its direction."""

    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min")
        waits = {"scheduler": scheduler, "monitor": "val/x"}
        return {"optimizer": optimizer, "lr_scheduler": waits}

    module = scripted(net, 2, 1, 3)
    module.configure = configure
    callback = PrintTableMetricsCallback(metric_patterns=["val/x"])

    make_trainer(callback, max_epochs=3).fit(module)

    assert marks(capsys) == [["2*"], ["1*", "-1"], ["3", "+2"]]


def test_without_a_direction_nothing_is_best(net, make_trainer, capsys):
    """Changes are shown all the same, unless they are switched off."""
    for options, expected in [({}, ["2", "+1"]), ({"show_change": False}, ["2"])]:
        callback = PrintTableMetricsCallback(metric_patterns=["val/x"], **options)
        make_trainer(callback, max_epochs=2).fit(scripted(net, 1, 2))
        assert marks(capsys) == [["1"], expected]


def test_rows_of_a_long_run_line_up(net, make_trainer, capsys):
    """The header comes back every 20 rows, with each number below the end of its name."""
    callback = PrintTableMetricsCallback(metric_patterns=["val/x"])

    make_trainer(callback, max_epochs=25, limit_train_batches=1).fit(scripted(net, *range(25)))

    printed = capsys.readouterr().out.splitlines()
    headers = [line for line in printed if "epoch" in line]
    assert [printed.index(headers[0]), len(headers), len(printed)] == [0, 2, 27]
    for name in ("epoch", "step"):
        end = headers[0].index(name) + len(name)
        assert all(line[end - 1].isdigit() for line in printed if line not in headers)


@pytest.mark.parametrize(("width", "headers"), [("80", 1), ("35", 4)])
def test_terminals_get_a_ruled_table_in_color(
    net, make_trainer, capsys, monkeypatch, width, headers
):
    """Where rich sees a terminal names are bold, the best and what is better green, the rest red."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", width)
    x = MetricConfig(name="val/x", mode="max")

    make_trainer(PrintTableMetricsCallback(metric_patterns=["val/x"], metrics=x), max_epochs=3).fit(
        scripted(net, 1, 2, 1.5)
    )

    out = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert max(map(len, plain)) <= int(width)
    assert next(line for line in plain if "─" in line).strip("─┼") == ""
    assert len([line for line in plain if "val/x" in line]) == (1 if width == "80" else 3)
    assert re.search(r"\x1b\[1;32m *2\*\x1b\[0m\x1b\[32m *\+1\x1b", out)
    assert re.search(r" *1\.5 \x1b\[31m *-0\.5\x1b", out)


def test_a_terminal_that_cannot_draw_gets_plain_lines(net, make_trainer, monkeypatch, tmp_path):
    """Where the encoding has no box characters, rules are made of what it has."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = tmp_path / "out.txt"
    with path.open("w", encoding="latin-1") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        make_trainer(PrintTableMetricsCallback(metric_patterns=["val/*"])).fit(net())

    assert "-+-" in path.read_text("latin-1")


class ZMQInteractiveShell:
    """By this name rich knows a notebook; the real one needs a kernel and a browser."""


@pytest.fixture
def notebook(monkeypatch):
    """What is shown in a notebook: one list for each output, with what it was replaced by."""
    outputs = []

    class Handle:
        def __init__(self, shown):
            self.shown = [shown]
            outputs.append(self.shown)

        def update(self, output):
            self.shown.append(output)

    module = ModuleType("IPython.display")
    module.display = lambda output, display_id: Handle(output)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    return outputs


def test_a_notebook_shows_one_table_that_grows(net, make_trainer, capsys, notebook):
    """Each validation replaces the output by one with a row more; the best of all is marked once."""
    x = MetricConfig(name="val/x", mode="max")
    trainer = make_trainer(
        PrintTableMetricsCallback(metric_patterns=["val/x"], metrics=[x]), max_epochs=4
    )

    trainer.fit(scripted(net, 1, 2, 2, 1.5))

    (shown,) = notebook
    pages = [output._repr_html_() for output in shown]
    assert [page.count("<tr>") for page in pages] == [2, 3, 4, 5]
    assert [page.count("*</b>") for page in pages] == [1, 1, 1, 1]
    assert ">2*</b>" in pages[-1]
    text = [line.split()[2] for line in repr(shown[-1]).splitlines()]
    assert text == ["val/x", "1", "2*", "2", "1.5"]
    assert capsys.readouterr().out == ""


def test_each_fit_has_its_own_output_in_a_notebook(net, make_trainer, notebook):
    """A second fit does not write into the cell of the first; rows so far are shown there too."""
    trainer = make_trainer(PrintTableMetricsCallback(metric_patterns=["val/*"]))
    trainer.fit(net())
    trainer.fit_loop.max_epochs = 2

    trainer.fit(net())

    assert [[page._repr_html_().count("<tr>") for page in shown] for shown in notebook] == [
        [2],
        [3],
    ]


def test_names_are_text_in_html():
    """A metric's name cannot be taken for markup."""
    assert "<th>&lt;i&gt;</th>" in as_html(["<i>"], [{"<i>": Cell("1")}])


def test_history_is_bounded_and_survives_a_resume(net, make_trainer, capsys, save_at, tmp_path):
    """Columns, rows and best values come back from a checkpoint; at most `max_rows` rows are kept."""
    path = tmp_path / "middle.ckpt"
    module = net(logs={"validation_step": ["val/b", "val/a"]})
    make_trainer(PrintTableMetricsCallback(), save_at(12, path), max_epochs=2).fit(module)
    capsys.readouterr()
    table = PrintTableMetricsCallback(max_rows=30)

    make_trainer(table, max_epochs=40, limit_train_batches=6).fit(
        net(logs={"validation_step": ["val/a", "val/new"]}), ckpt_path=path
    )

    assert lines(capsys)[0] == ["epoch", "step", "val/a", "val/b", "val/new"]
    assert len(table.rows) == 30
    assert table.rows[-1]["epoch"] == 39


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_what_was_best_before_a_resume_is_remembered(net, make_trainer, capsys, save_at, tmp_path):
    """A resumed run marks what beats the interrupted one's best, and shows the change from it."""
    x = MetricConfig(name="val/x", mode="max")
    path = tmp_path / "middle.ckpt"
    options = {"metric_patterns": ["val/x"], "max_rows": 1}
    values = [5, 3, 4, 6, 6.5]
    make_trainer(
        PrintTableMetricsCallback(metrics=[x], **options), save_at(13, path), max_epochs=3
    ).fit(scripted(net, *values))
    capsys.readouterr()

    make_trainer(
        PrintTableMetricsCallback(metrics=[x], **options), max_epochs=5, enable_progress_bar=False
    ).fit(scripted(net, *values), ckpt_path=path)

    assert marks(capsys) == [["4", "+1"], ["6*", "+2"], ["6.5*", "+0.5"]]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_another_direction_forgets_what_was_best(net, make_trainer, capsys, save_at, tmp_path):
    """Resumed with the other mode, the rows that are left say what was best."""
    path = tmp_path / "middle.ckpt"
    values = [5, 3, 4, 6]

    def fit(mode, epochs, *others, **options):
        x = MetricConfig(name="val/x", mode=mode)
        table = PrintTableMetricsCallback(metrics=[x], metric_patterns=["val/x"])
        make_trainer(table, *others, max_epochs=epochs).fit(scripted(net, *values), **options)
        return table

    assert fit("max", 3, save_at(13, path)).best == {"val/x": 5}
    assert fit("min", 4, ckpt_path=path).best == {"val/x": 3}
