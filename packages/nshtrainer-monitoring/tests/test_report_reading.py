"""What `nshtrainer report` makes of the files of a run: thinned series, damaged logs, plots by name."""

from __future__ import annotations

import json
import math
import tracemalloc
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nshtrainer_monitoring.report.arranging import arrange, split_stage
from nshtrainer_monitoring.report.axes import axis_of, number, steps_axis
from nshtrainer_monitoring.report.metrics_file import find_files, read_metrics
from nshtrainer_monitoring.report.page import page
from nshtrainer_monitoring.report.run import read_run, tell_apart
from nshtrainer_monitoring.report.series import Series, thin
from nshtrainer_monitoring.report.settings import differences, flat
from nshtrainer_monitoring.report.terminal import Style, draw


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def points(series: Series) -> list[tuple[float, float]]:
    return list(zip(series.xs, series.ys, strict=True))


# ---- series ------------------------------------------------------------------------------------

values = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(ys=st.lists(values, min_size=1, max_size=400), buckets=st.integers(1, 20))
def test_thinning_keeps_what_stands_out(ys, buckets):
    """Ends, least and greatest value stay, a gap stays one, and there are at most five points a bucket."""
    xs = array("d", range(len(ys)))

    kept_x, kept_y = thin(xs, array("d", ys), buckets)

    original = dict(zip(xs, ys, strict=True))
    assert list(kept_x) == sorted(set(kept_x))
    assert all(original[x] == y or math.isnan(y) for x, y in zip(kept_x, kept_y, strict=True))
    assert (kept_x[0], kept_x[-1]) == (xs[0], xs[-1])
    finite = [y for y in ys if math.isfinite(y)]
    if finite:
        left = [y for y in kept_y if math.isfinite(y)]
        assert (min(left), max(left)) == (min(finite), max(finite))
    assert any(not math.isfinite(y) for y in kept_y) == (len(finite) < len(ys))
    assert len(kept_x) <= max(5 * (buckets + 1), 5)


def test_a_long_series_stays_short_and_loses_no_spike():
    """A million points, thinned as they come: one spike and one NaN are still there at their steps."""
    series = Series("loss", buckets=100)
    for step in range(1_000_000):
        series.add(step, 1e6 if step == 123_456 else math.nan if step == 700_001 else step % 7)

    assert len(series.xs) <= 2000
    assert series.count == 1_000_000
    assert series.highest == (123_456, 1e6)
    assert [x for x, _ in series.nonfinite] == [700_001]
    assert series.last == (999_999, 999_999 % 7)


def test_an_earlier_step_replaces_what_followed_it():
    """A run that was resumed from step 3 logs the steps after it again."""
    series = Series("loss")
    for step, value in [(1, 10), (2, 20), (3, 30), (4, 40), (3, 31), (4, 41), (5, 51)]:
        series.add(step, value)

    assert points(series) == [(1, 10), (2, 20), (3, 31), (4, 41), (5, 51)]
    assert series.count == 5


# ---- metrics.csv -------------------------------------------------------------------------------


def test_a_file_cut_anywhere_gives_no_wrong_number(tmp_path):
    """Killed while it was written, at any byte: every value that is shown was logged."""
    whole = "step,train/loss,val/loss\r\n" + "".join(
        f"{i},{1 / (i + 3)!r},{'' if i % 2 else 12.375 * i!r}\r\n" for i in range(6)
    )
    logged = {(float(i), 1 / (i + 3)) for i in range(6)}
    for end in range(len(whole) + 1):
        text = whole[:end]
        found = read_metrics([write(tmp_path / "metrics.csv", text)])
        seen = points(found.series["train/loss"]) if found.series else []
        assert set(seen) <= logged
        assert len(seen) == max(text.count("\r") - 1, 0)
        is_cut = end > 0 and not text.endswith(("\r", "\n"))
        assert any("not finished" in note for note in found.notes) == is_cut


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("step,loss\n", {}),
        ("step,loss\n0,1.5\n", {"loss": [(0, 1.5)]}),
        ("loss\n1.5\n2.5\n", {"loss": [(0, 1.5), (1, 2.5)]}),
        ("step,loss\n0,1\n\n1,word\n2,3\n3,4,5\nx,6\n", {"loss": [(0, 1), (2, 3)]}),
        ("step,loss\n0,1\n\0\0\0\0\n1,2\n", {"loss": [(0, 1), (1, 2)]}),
        ('step,"a,""b"""\n0,1\n', {'a,"b"': [(0, 1)]}),
    ],
    ids=["empty", "header", "one row", "no step", "garbage", "NUL", "quoted name"],
)
def test_damaged_and_unusual_files_are_read_as_far_as_they_go(tmp_path, text, expected):
    """Nothing raises, whole rows are kept, and what was left out is said."""
    found = read_metrics([write(tmp_path / "metrics.csv", text)])

    assert {n: points(s) for n, s in found.series.items()} == expected
    if "word" in text or "\0" in text or text.startswith("loss"):
        assert found.notes


def test_not_a_number_is_a_value_and_an_empty_cell_is_none(tmp_path):
    """`nan` and `inf` are kept as they are; what was not logged at a step is no gap."""
    text = "step,a,b\n0,1,\n1,nan,\n2,inf,5\n3,-inf,\n"
    found = read_metrics([write(tmp_path / "metrics.csv", text)]).series

    assert list(found["a"].ys)[2:] == [math.inf, -math.inf]
    assert math.isnan(found["a"].ys[1])
    assert [x for x, _ in found["a"].nonfinite] == [1, 2, 3]
    assert points(found["b"]) == [(2, 5)]


def test_of_several_files_the_later_counts(tmp_path):
    """A session that logged to another folder replaces the steps that it logged again."""
    import os

    old = write(tmp_path / "log/csv/a/metrics.csv", "step,x,y\n0,1,1\n5,2,1\n9,3,1\n")
    new = write(tmp_path / "log/csv/b/metrics.csv", "step,x\n5,7\n6,8\n")
    write(tmp_path / "checkpoint/metrics.csv", "step,x\n0,100\n")
    os.utime(old, (1, 1))

    files = find_files(tmp_path)
    found = read_metrics(files)

    assert files == [old, new]
    assert points(found.series["x"]) == [(0, 1), (5, 7), (6, 8)]
    assert len(found.series["y"].xs) == 3
    assert any("2 metrics files" in note for note in found.notes)


def test_a_large_file_is_streamed(tmp_path):
    """The memory that reading takes is bounded, whatever the length, and extremes are found."""
    names = [f"m{i}" for i in range(8)]
    path = tmp_path / "metrics.csv"
    with path.open("w") as file:
        file.write(f"step,{','.join(names)}\n")
        for step in range(120_000):
            value = 9e9 if step == 31_111 else step / 7
            file.write(f"{step}," + ",".join(f"{value + i!r}" for i in range(8)) + "\n")
    assert path.stat().st_size > 16e6

    tracemalloc.start()
    try:
        found = read_metrics([path])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 8e6
    assert found.rows == 120_000
    assert found.series["m3"].highest == (31_111, 9e9 + 3)


# ---- axes --------------------------------------------------------------------------------------


@given(st.lists(st.floats(), max_size=6))
def test_axes_hold_all_values_with_a_few_round_ticks(values):
    """Whatever is logged: each number lies on the axis, ticks ascend inside of it, labels differ."""
    axis = axis_of(values)

    finite = [v for v in values if math.isfinite(v)]
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.at(v) <= 1 + 1e-6 for v in finite)
    assert list(axis.ticks) == sorted(axis.ticks)
    assert all(-1e-6 <= axis.at(t) <= 1 + 1e-6 for t in axis.ticks)
    assert len(set(axis.labels)) == len(axis.labels) <= 12
    assert all(len(label) <= 24 for label in axis.labels)


@pytest.mark.parametrize(
    ("values", "is_log", "labels"),
    [
        ([0.0, 1.0], False, ("0.0", "0.5", "1.0")),
        ([1e-4, 100.0], True, ("1e-4", "0.01", "1", "100")),
        ([0.0, 1000.0], False, ("0", "500", "1000")),
        ([3.0], False, ("2.8", "3.0", "3.2")),
    ],
)
def test_values_that_span_decades_are_on_a_log_scale(values, is_log, labels):
    """A factor of 1,000 between positive values; zero has no logarithm."""
    axis = axis_of(values, 3)

    assert axis.is_log == is_log
    assert axis.labels == labels


def test_steps_are_whole_numbers():
    """Two steps have no tick between them; large ones are short."""
    assert set(steps_axis(0, 2).ticks) == {0, 1, 2}
    assert steps_axis(0, 400_000).labels == ("0", "100k", "200k", "300k", "400k")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (12000.0, "12,000"), (math.nan, "NaN"), (-math.inf, "-inf"), (None, "")],
)
def test_numbers_in_tables(value, text):
    """Four digits, whole numbers in full, and what is no number by name."""
    assert number(value) == text


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "stage"),
    [
        ("train/loss", "loss", "train"),
        ("val_loss", "loss", "val"),
        ("validation.acc", "acc", "val"),
        ("loss_val", "loss", "val"),
        ("train_loss_epoch", "loss", "train"),
        ("ema/val/loss", "loss", "val"),
        ("val/loss/dataloader_idx_1", "loss", "val"),
        ("value", "value", ""),
        ("trainable", "trainable", ""),
        ("loss", "loss", ""),
    ],
)
def test_names_tell_what_is_measured_and_when(name, base, stage):
    """The ways in which Lightning users write it; a word that only begins like a stage is none."""
    assert split_stage(name)[:2] == (base, stage)


def test_every_metric_is_in_one_plot_and_those_of_ours_in_their_sections():
    """Train and validation share a plot, the primary metric comes first, single parameters are folded."""
    names = [
        "train_loss", "val_loss", "val_acc", "train/grad_norm", "train/grad_norm_clipped",
        "train/grad_2.0_norm/layer.weight", "train/param_norm", "train/update_ratio", "lr-AdamW",
        "train/exp_avg_sq_norm", "train/optimizer_1/grad_norm", "train/grad_clip_coefficient",
        "lr-AdamW-momentum", "train/grad_skipped_steps", "train/grad_skipped_fraction",
        "train/data_time_s", "train/epoch_time_s", "train/samples_per_s", "computed_epoch",
        "attention/entropy", "time/forward",
    ]  # fmt: skip
    found = arrange(names, primary="val_acc")

    def inside(panels):
        return {p.title: [line.metric for line in p.lines] for p in panels}

    assert list(inside(found.main)) == ["acc", "loss"]
    assert inside(found.main)["loss"] == ["train_loss", "val_loss"]
    assert inside(found.norms) == {
        "gradient norm": [
            "train/grad_norm",
            "train/grad_norm_clipped",
            "train/optimizer_1/grad_norm",
        ],
        "parameter norm": ["train/param_norm"],
        "update ratio": ["train/update_ratio"],
        "moment norm": ["train/exp_avg_sq_norm"],
        "grad clip coefficient": ["train/grad_clip_coefficient"],
    }
    assert list(inside(found.rates)) == ["learning rate", "momentum"]
    assert list(inside(found.skips)) == ["skipped fraction", "skipped steps"]
    assert inside(found.groups["grad_2.0_norm"]) == {
        "layer.weight": ["train/grad_2.0_norm/layer.weight"]
    }
    panels = [
        *found.main, *found.norms, *found.rates, *found.skips, *found.times,
        *(p for panels in found.groups.values() for p in panels),
    ]  # fmt: skip
    assert sorted(line.metric for p in panels for line in p.lines) == sorted(names)


@given(st.lists(st.text(max_size=30), unique=True, max_size=30))
def test_no_name_is_lost_or_drawn_twice(names):
    """Whatever metrics are called, each has one line, and no plot more lines than colours."""
    found = arrange(names)
    panels = [
        *found.main, *found.norms, *found.rates, *found.skips, *found.times,
        *(p for panels in found.groups.values() for p in panels),
    ]  # fmt: skip

    assert sorted(line.metric for p in panels for line in p.lines) == sorted(names)
    assert all(1 <= len(p.lines) <= 8 for p in panels)


# ---- metadata ----------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def mappings(*keys: str):
    """Mappings with some of the keys that are looked for, and whatever behind them."""
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), anything, max_size=6)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    record=mappings("id", "name", "status", "plugins", "callbacks", "environment", "project"),
    environment=mappings("time", "python", "git", "packages", "command_line", "hardware"),
    config=mappings("primary_metric", "callbacks", "loggers", "max_epochs", "id", "ema"),
    sidecar=mappings(
        "global_step", "epoch", "monitor", "checkpoint_size_bytes", "callback", "attempt",
        "training_time_s", "trainer_config", "save_number",
    ),
)  # fmt: skip
def test_whatever_stands_in_the_metadata_there_is_a_page(
    tmp_path, record, environment, config, sidecar
):
    """Files of other programs, later versions and accidents: no content is an error."""
    root = tmp_path / "run"
    write(root / "run.json", json.dumps({"environment": environment, **record}))
    write(root / "config.yaml", json.dumps(config))
    write(root / "log" / "csv" / "metrics.csv", "step,epoch,val/loss\n0,nan,1\n5,1,inf\n")
    write(root / "checkpoint" / "last" / "a.ckpt", "")
    write(root / "checkpoint" / "last" / "a.ckpt.metadata.json", json.dumps(sidecar))

    runs = [read_run(root), read_run(root)]
    tell_apart(runs)

    assert page(runs[:1]).encode().endswith(b"</html>\n")
    assert page(runs).count("<h2>") >= 2
    assert draw(runs, Style(encoding="ascii")).isascii()


# ---- configurations ----------------------------------------------------------------------------


def test_callbacks_are_compared_by_name_and_not_by_place():
    """Another order is no difference; another option of one callback is."""
    first = {"id": "a", "seed": 1, "callbacks": [{"name": "ema", "decay": 0.9}, {"name": "x"}]}
    second = {"id": "b", "seed": 1, "callbacks": [{"name": "x"}, {"name": "ema", "decay": 0.5}]}

    assert flat(first)["callbacks[ema].decay"] == 0.9
    assert differences([first, second]) == {"callbacks[ema].decay": ["0.9", "0.5"]}
    assert differences([{"a": None, "b": 1}, {"c": {"d": None}}]) == {"b": ["1", ""]}
    long = "x" * 1000
    assert list(differences([{"a": long + "1"}, {"a": long + "2"}])) == ["a"]
    twice = flat({"callbacks": [{"name": "x", "a": 1}, {"name": "x", "a": 2}]})
    assert twice["callbacks[x].a"] == 1
    assert twice["callbacks[x 2].a"] == 2
