"""What early stopping sends to loggers."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from nshtrainer_ema import EarlyStoppingCallback


class Recording(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = version = "recording"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        """The rows that have a name that begins so, with these names shortened."""
        found = [
            (s, {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)})
            for s, row in self.rows
        ]
        return [(s, row) for s, row in found if row]


def test_each_check_is_logged_beside_its_metric(fit, metric):
    """The count, the best value, and at the end the reason as Lightning numbers it."""
    logger = Recording()
    stopper = EarlyStoppingCallback(metric=metric, patience=2)
    fit(stopper, [3, 2, 4, 4, 9], logger=logger, log_every_n_steps=1)

    assert logger.of("early_stopping/") == [
        (1, {"wait_count": 0, "best": 3}),
        (3, {"wait_count": 0, "best": 2}),
        (5, {"wait_count": 1, "best": 2}),
        (7, {"wait_count": 2, "best": 2, "stopping_reason": 3}),
    ]
    assert [step for step, _ in logger.of("val/metric")] == [1, 3, 5, 7]
    assert all(
        isinstance(v, float) for _, row in logger.of("early_stopping/") for v in row.values()
    )


def test_a_metric_of_the_epochs_end_is_logged_at_its_step(make_model, fit, metric):
    """Lightning's x-axis has moved on by then, for itself too."""

    class Late(make_model):
        def on_train_epoch_end(self) -> None:
            self.log("late", 1.0)

    logger = Recording()
    stopper = EarlyStoppingCallback(metric=metric.replace(name="late"), patience=2)
    fit(stopper, [1] * 5, model=Late(), logger=logger, log_every_n_steps=1)

    assert [step for step, _ in logger.of("early_stopping/")] == [1, 3, 5]
    assert [step for step, _ in logger.of("late")] == [1, 3, 5]


@pytest.mark.parametrize(
    ("unit", "name"), [("steps", "waited_steps"), ("hours", "waited_hours"), ("checks", None)]
)
def test_another_unit_of_patience_is_logged_too(unit, name, fit, metric):
    """Under its own name, beside the checks."""
    logger = Recording()
    stopper = EarlyStoppingCallback(metric=metric, patience=99, patience_unit=unit)
    fit(stopper, [3, 4], logger=logger, log_every_n_steps=1)

    _, row = logger.of("early_stopping/")[-1]
    assert row.keys() == {"wait_count", "best", *([] if name is None else [name])}
    if unit == "steps":
        assert row[name] == 2


def test_a_label_is_in_the_names_and_nothing_infinite_is_logged(fit, metric):
    """Two of them do not write over each other; not every logger takes an infinity."""
    logger = Recording()
    stopper = EarlyStoppingCallback(
        metric=metric, patience=9, label="goal", check_finite=False, log_metrics=True
    )
    fit(stopper, [float("nan")], logger=logger, log_every_n_steps=1)

    assert logger.of("early_stopping/goal/") == [(1, {"wait_count": 1.0})]


def test_it_can_be_switched_off(fit, metric):
    """Nothing is logged then."""
    logger = Recording()
    stopper = EarlyStoppingCallback(metric=metric, patience=1, log_metrics=False)
    fit(stopper, [3, 4], logger=logger, log_every_n_steps=1)

    assert logger.of("early_stopping/") == []


def test_lightnings_csv_logger_takes_it(fit, metric, tmp_path):
    """A logger that writes columns."""
    logger = CSVLogger(tmp_path, name="", version="run")
    fit(
        EarlyStoppingCallback(metric=metric, patience=1), [3, 4], logger=logger, log_every_n_steps=1
    )
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert [r["early_stopping/best"] for r in rows if r["early_stopping/best"]] == ["3.0", "3.0"]
    assert "3.0" in [r["early_stopping/stopping_reason"] for r in rows]
