"""What cannot start is found before anything is built."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from nshtrainer import ConfigError, TrainerConfig
from nshtrainer.callbacks.conflicts import check_config

METRIC = {"name": "val/loss", "mode": "min"}
MAY_GIVE_WAY = {"metadata": {"ignore_if_exists": True}}


def averages(*more: dict[str, Any]) -> dict[str, Any]:
    return {"callbacks": [{"name": "ema", "decay": 0.9, **options} for options in more]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (averages({}, {}), "2 configurations of 'ema'"),
        (averages({"label": "slow"}, {"label": "fast"}), "2 configurations of 'ema'"),
        ({"early_stopping": {"patience": 3}}, "early_stopping has nothing to wait for"),
        (
            {"callbacks": [{"name": "early_stopping", "patience": 3}]},
            "early_stopping has nothing to wait for",
        ),
        (
            {
                "early_stopping": {"patience": 3, "metric": METRIC, "restore_best_weights": True},
                "enable_checkpointing": False,
            },
            "enable_checkpointing=False forbids",
        ),
    ],
    ids=[
        "two averages",
        "labels do not help",
        "no metric",
        "no metric in the list",
        "nothing to restore",
    ],
)
def test_what_cannot_start_is_refused(values, said):
    """The check that every run and `nshtrainer validate` make names what would stop the run."""
    with pytest.raises(ConfigError, match=f"nshtrainer-ema: .*{said}"):
        check_config(TrainerConfig.model_validate(values))


@pytest.mark.parametrize(
    "values",
    [
        {},
        averages({}),
        averages({}, MAY_GIVE_WAY),
        {"early_stopping": {"patience": 3, "metric": METRIC}},
        {"early_stopping": {"patience": 3}, "primary_metric": METRIC},
        {"early_stopping": {"patience": 3, "metric": METRIC, "restore_best_weights": True}},
        {"early_stopping": False},
    ],
    ids=["nothing", "one", "one may give way", "own metric", "primary metric", "restores", "off"],
)
def test_what_can_start_passes(values):
    """A run that could start is not refused."""
    check_config(TrainerConfig.model_validate(values))


def test_validating_costs_no_torch(tmp_path):
    """`nshtrainer validate` refuses two averages on a machine without torch."""
    (tmp_path / "run.yaml").write_text(
        "callbacks: [{name: ema, decay: 0.9}, {name: ema, decay: 0.8, label: b}]"
    )
    code = (
        "import sys; from nshtrainer_cli import main\n"
        "try: main(['validate', 'run.yaml'])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'lightning') if m in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "1 []"
    assert "2 configurations of 'ema'" in done.stderr
