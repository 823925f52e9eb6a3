"""The benchmarks: how they judge, and that each of them runs. Nothing here depends on the clock."""

from __future__ import annotations

import gc
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nshtrainer import TrainerConfig
from nshtrainer.plugins.catalogue import CALLBACKS, LOGGERS

if TYPE_CHECKING:
    from benchmarks import every_family, method, rows, turns
else:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        method = importlib.import_module("benchmarks.method")
        rows = importlib.import_module("benchmarks.rows")
        every_family = importlib.import_module("benchmarks.every_family")
        turns = importlib.import_module("benchmarks.turns")
    finally:
        sys.path.pop(0)

ROOT = Path(__file__).parents[1]
NAMES = (
    "import",
    "validation",
    "discovery",
    "resolve",
    "first_batch",
    "overhead",
    "checkpoint",
    "ema",
    "cuda",
    "norms",
)
ON_ANY_MACHINE = tuple(
    name for name in NAMES if name != "cuda"
)  # which compares nothing without one


def samples(*seconds: float) -> list[method.Sample]:
    """Samples whose wall time is *seconds*, with twice the CPU time."""
    return [method.Sample(s, 2 * s) for s in seconds]


def scripted(values: dict[str, list[float]]) -> dict[str, method.Sampler]:
    """Samplers that give the values in turn."""
    queues = {name: iter(samples(*seconds)) for name, seconds in values.items()}
    return {name: lambda queue=queue: next(queue) for name, queue in queues.items()}


def rows_of(comparison: method.Comparison, settings: method.Settings) -> list[rows.Row]:
    """The rows that a benchmark with this comparison gives."""
    found = method.compare(comparison, settings)
    return [rows.row_of("b", comparison, s, r, settings) for s, r in found.items()]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line from the root of the repository."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_value_is_the_median_of_the_per_round_ratios():
    """A machine that gets three times slower changes neither the ratio nor its spread."""
    ratio = method.ratio_of(samples(2.0, 6.0, 4.0), samples(1.0, 3.0, 2.0))

    assert ratio.value == 2.0
    assert ratio.spread == 0.0
    assert ratio.cpu == 2.0
    assert ratio.seconds == 4.0


def test_the_median_is_not_the_ratio_of_the_medians():
    """Rounds are compared within themselves: here the ratio of the medians would be 1."""
    ratio = method.ratio_of(samples(1.0, 2.0, 30.0), samples(2.0, 1.0, 10.0))

    assert ratio.value == 2.0
    assert ratio.best == 1.0


def test_the_spread_is_half_the_interquartile_range_over_the_median():
    """Ratios 1 to 5 have the quartiles 2 and 4."""
    ratio = method.ratio_of(samples(1.0, 2.0, 3.0, 4.0, 5.0), samples(1.0, 1.0, 1.0, 1.0, 1.0))

    assert ratio.spread == pytest.approx(1 / 3)
    assert not ratio.is_steady


@pytest.mark.slow
def test_training_that_fails_ends_the_benchmark():
    """It is neither waited for nor taken for a fast one."""
    with (
        pytest.raises(RuntimeError, match="a training ended"),
        turns.taking_turns(
            {"makes no trainer": print}, "the demo's CNN", first=2, steps=2, copies=1
        ),
    ):
        pass


def test_turns_of_a_round_are_one_sample():
    """Each turn starts with the next competitor, as each round does, and a sample is their mean."""
    samplers = scripted({"a": [1.0, 3.0, 5.0, 7.0], "b": [2.0, 2.0, 2.0, 4.0]})

    taken = method.take_rounds(samplers, rounds=2, warmups=0, turns=2)

    assert [sample.wall for sample in taken["a"]] == [2.0, 6.0]
    assert [sample.wall for sample in taken["b"]] == [2.0, 3.0]


def test_one_round_has_no_spread():
    """A single round is refused rather than called steady."""
    with pytest.raises(ValueError, match="1 rounds have no spread; take at least 2"):
        method.ratio_of(samples(1.0), samples(1.0))


def test_a_clock_that_did_not_move_gives_no_cpu_ratio():
    """A coarse CPU clock leaves the ratio out instead of dividing by zero."""
    still = [method.Sample(1.0, 0.0)] * 2

    assert method.ratio_of(samples(1.0, 1.0), still).cpu is None


def test_each_round_starts_with_the_next_competitor():
    """A B C, B C A, C A B: nobody always comes after the same one; warm-ups do not count."""
    order: list[str] = []

    def sampler(name: str) -> method.Sampler:
        def sample() -> method.Sample:
            order.append(name)
            return method.Sample(float(len(order)), 0.0)

        return sample

    taken = method.take_rounds({n: sampler(n) for n in "ABC"}, rounds=2, warmups=1)

    assert "".join(order) == "ABCBCACAB"
    assert [s.wall for s in taken["A"]] == [6.0, 8.0]


def test_garbage_is_not_collected_inside_a_round():
    """The collector is off while samples are taken, and on again after them, also after an error."""
    seen: list[bool] = []

    def sample() -> method.Sample:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError("stop")
        return method.Sample(1.0, 1.0)

    with pytest.raises(RuntimeError, match="stop"):
        method.take_rounds({"A": sample}, rounds=5, warmups=0)

    assert seen == [False, False, False]
    assert gc.isenabled()


def test_a_sample_is_the_mean_over_calls_that_fill_the_time():
    """Calls of a quarter of a second: four of them fill one second."""
    calls: list[float] = []
    sample = method.filling(lambda: calls.append(0.25), 1.0, clock=lambda: sum(calls))

    first, second = sample(), sample()

    assert (first.wall, second.wall) == (0.25, 0.25)
    assert len(calls) == 8


def test_an_unsteady_ratio_is_measured_again_and_a_steady_one_kept():
    """B is steady at once and keeps its first value; C becomes steady in the second attempt."""
    comparison = method.Comparison(
        case="c",
        baseline="A",
        samplers=scripted(
            {
                "A": [1.0] * 6,
                "B": [2.0, 2.0, 2.0, 9.0, 9.0, 9.0],
                "C": [1.0, 5.0, 9.0, 3.0, 3.0, 3.0],
            }
        ),
    )

    found = method.compare(comparison, method.Settings(rounds=3, warmups=0))

    assert (found["B"].value, found["B"].attempt) == (2.0, 1)
    assert (found["C"].value, found["C"].attempt) == (3.0, 2)


def test_no_verdict_after_three_unsteady_attempts():
    """A spread above 20 % is no verdict, even where the value is below the limit."""
    noisy = [1.0, 5.0, 9.0] * 3
    comparison = method.Comparison(
        case="c", baseline="A", samplers=scripted({"A": [1.0] * 9, "B": noisy}), limits={"B": 99.0}
    )

    (row,) = rows_of(comparison, method.Settings(rounds=3, warmups=0))

    assert row.verdict == "no verdict"
    assert row.attempt == 3


@pytest.mark.parametrize(("limit", "verdict"), [(2.0, "met"), (1.9, "missed"), (None, "")])
def test_a_steady_ratio_is_held_against_its_limit(limit: float | None, verdict: str):
    """The limit itself is met; a row without a limit is only reported."""
    limits = {} if limit is None else {"B": limit}
    comparison = method.Comparison(
        case="c", baseline="A", samplers=scripted({"A": [1.0] * 3, "B": [2.0] * 3}), limits=limits
    )

    (row,) = rows_of(comparison, method.Settings(rounds=3, warmups=0))

    assert (row.subject, row.baseline, row.limit, row.verdict) == ("B", "A", limit, verdict)


def test_a_quick_run_gives_no_verdict():
    """Too few rounds judge nothing, however steady they are."""
    comparison = method.Comparison(
        case="c",
        baseline="A",
        samplers=scripted({"A": [1.0] * 3, "B": [2.0] * 3}),
        limits={"B": 1.0},
    )

    (row,) = rows_of(comparison, method.Settings.quick())

    assert row.verdict == "quick"


def test_the_table_shows_every_row_aligned():
    """A Markdown table whose lines have one width."""
    comparison = method.Comparison(
        case="c",
        baseline="A",
        samplers=scripted({"A": [1e-4] * 3, "a longer name": [2e-3] * 3}),
        limits={"a longer name": 1.5},
    )
    table = rows.as_table(rows_of(comparison, method.Settings(rounds=3, warmups=0)))

    assert len({len(line) for line in table.splitlines()}) == 1
    cells = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    assert cells[:8] == ["b", "c", "a longer name", "A", "20.0", "0%", "1.500", "missed"]
    assert cells[-1] == "2 ms"


def test_the_measured_configuration_uses_every_family():
    """It validates, and holds each callback and logger that the first-party families provide."""
    config = TrainerConfig.model_validate(every_family.every_family())

    assert {*CALLBACKS, *LOGGERS} <= set(re.findall(r'"name":"(\w+)"', config.model_dump_json()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_ANY_MACHINE)
def test_every_benchmark_runs_quickly_and_gives_rows(name: str, tmp_path: Path):
    """`--quick --json` writes rows of one form, with the machine, and says that it judges nothing."""
    file = tmp_path / "rows.json"

    done = run(name, "--quick", "--json", str(file))

    assert done.returncode == 0, done.stderr
    assert "this is no verdict" in done.stdout
    document = json.loads(file.read_text())
    assert document["settings"]["is_quick"] is True
    assert {"date", "processor", "cores", "python", "versions"} <= set(document["machine"])
    assert document["rows"]
    for row in document["rows"]:
        assert set(row) == set(rows.Row.__dataclass_fields__)
        assert (row["benchmark"], row["verdict"]) == (name, "quick")
        assert row["value"] > 0
        assert row["spread"] >= 0
        assert row["subject"] != row["baseline"]
        assert row["case"] in done.stdout


@pytest.mark.slow
def test_the_command_line_lists_the_benchmarks_and_refuses_others():
    """`--help` names all of them and a wrong name is answered with the right ones."""
    listed, refused = run("--help"), run("imports")

    assert all(f"\n{name} " in listed.stdout for name in NAMES)
    assert refused.returncode == 2
    assert f"no benchmark is named 'imports'; there are {', '.join(NAMES)}" in refused.stderr


def test_the_page_of_results_tells_of_every_benchmark():
    """`docs/benchmarks.md` has a row of its table for each."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()

    assert [name for name in NAMES if f"| `{name}` |" not in page] == []
