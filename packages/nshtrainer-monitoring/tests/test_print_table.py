from __future__ import annotations

import re

import pytest

from nshtrainer_monitoring import PrintTableMetricsCallback
from nshtrainer_monitoring.print_table.layout import format_value, lay_out


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


def test_columns_are_found_by_name():
    """A missing value leaves its column empty instead of moving the others."""
    (block,) = lay_out(["epoch", "a_long_metric_name", "b"], {"epoch": 1.0, "b": 2.5})

    assert block.header.split() == ["epoch", "a_long_metric_name", "b"]
    assert block.row.split() == ["1", "-", "2.5"]
    assert len(block.header) == len(block.row)
    for name, cell in [("epoch", "1"), ("a_long_metric_name", "-"), ("b", "2.5")]:
        end = block.header.index(name) + len(name)
        assert block.row[:end].endswith(cell)


def test_narrow_terminals_get_several_blocks():
    """What does not fit is continued below, never cut; a column wider than the line stands alone."""
    names = ["aaaa", "bbbb", "c" * 40, "dddd"]
    blocks = lay_out(names, dict.fromkeys(names, 1.0), width=25)

    assert [block.header.split() for block in blocks] == [names[:2], names[2:3], names[3:]]
    assert all(len(block.header) <= 25 for block in blocks if "c" not in block.header)


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
    assert row[3] == "5"


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


@pytest.mark.parametrize("bar", ["tqdm", "rich", "silent"])
def test_a_progress_bar_does_not_swallow_rows(net, make_trainer, capsys, bar):
    """Rows are printed through the bar, or past one that is switched off."""
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    bars = {
        "tqdm": TQDMProgressBar,
        "rich": RichProgressBar,
        "silent": lambda: TQDMProgressBar(refresh_rate=0),
    }
    trainer = make_trainer(
        PrintTableMetricsCallback(metric_patterns=["val/*"]),
        bars[bar](),
        enable_progress_bar=True,
        max_epochs=2,
    )

    trainer.fit(net())

    # Bars move the cursor, so a row need not begin its line.
    assert len(re.findall(r"(?:0 +6|1 +12) +0\.\d+", capsys.readouterr().out)) == 2


@pytest.mark.parametrize(("width", "headers"), [("80", 1), ("25", 2)])
def test_terminals_get_a_highlighted_header(net, make_trainer, capsys, monkeypatch, width, headers):
    """Where rich sees a terminal the header is bold; where rows are split, each one has its own."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", width)

    make_trainer(PrintTableMetricsCallback(metric_patterns=["val/*"]), max_epochs=2).fit(net())

    out = capsys.readouterr().out
    assert out.count("\x1b[1m") == headers * (2 if width == "25" else 1)
    assert out.count("val/loss") == headers


def test_history_is_bounded_and_survives_a_resume(net, make_trainer, capsys, save_at, tmp_path):
    """Columns and rows come back from a checkpoint; at most 100 rows are kept."""
    path = tmp_path / "middle.ckpt"
    module = net(logs={"validation_step": ["val/b", "val/a"]})
    make_trainer(PrintTableMetricsCallback(), save_at(12, path), max_epochs=2).fit(module)
    capsys.readouterr()
    table = PrintTableMetricsCallback()

    make_trainer(table, max_epochs=110, limit_train_batches=6).fit(
        net(logs={"validation_step": ["val/a", "val/new"]}), ckpt_path=path
    )

    assert lines(capsys)[0] == ["epoch", "step", "val/a", "val/b", "val/new"]
    assert len(table.rows) == 100
    assert table.rows[-1]["epoch"] == 109
