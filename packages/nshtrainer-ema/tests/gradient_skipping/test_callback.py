"""Gradient skipping: which steps are left out, what stays untouched, what is counted and logged."""

from __future__ import annotations

import csv
import logging
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pydantic import ValidationError
from torch import Tensor

from nshtrainer_ema import GradientSkippingCallback, GradientSkippingCallbackConfig
from nshtrainer_ema.gradient_skipping.policy import should_skip

INF, NAN = float("inf"), float("nan")
HUGE = 1e6


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    return {"model": make_model, "trainer": make_trainer, "loader": make_loader}


def skipping(threshold: float = 200.0, **options: Any) -> GradientSkippingCallback:
    return GradientSkippingCallback(threshold=threshold, **{"start_after_n_steps": 0, **options})


def stood_still(model: Any) -> list[int]:
    """The batches after which the weights were bitwise what they had been before."""
    history = model.trained
    return [
        i
        for i in range(1, len(history))
        if all(torch.equal(a, b) for a, b in zip(history[i - 1], history[i], strict=True))
    ]


def fit(make: Any, callback: Any, *, model: Any = None, batches: int = 6, **options: Any) -> Any:
    model = model or make["model"](batch_losses={2: HUGE, 4: HUGE})
    trainer = make["trainer"](callback, limit_val_batches=0, **options)
    trainer.fit(model, make["loader"](batches))
    return model, trainer


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@pytest.mark.parametrize("skip_non_finite", [False, True])
@pytest.mark.parametrize("norm", [0.0, 0.999, 1.0, 1.001, INF, NAN])
def test_one_rule_says_what_is_skipped(norm, skip_non_finite, norm_type):
    """Finite and above the threshold, or not finite if skip_non_finite: Inf and NaN alike."""
    expected = skip_non_finite if norm in (INF,) or norm != norm else norm > 1.0

    flag = should_skip(torch.tensor(norm), 1.0, skip_non_finite=skip_non_finite)
    assert flag.item() is expected
    assert should_skip(norm, 1.0, skip_non_finite=skip_non_finite) is expected
    assert should_skip(torch.tensor(norm), INF, skip_non_finite=False).item() is False


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, "2", "inf"])
@pytest.mark.parametrize(
    "trainer",
    [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.5}],
    ids=["32", "bf16", "clip"],
)
def test_a_step_above_the_threshold_is_left_out(trainer, norm_type, fused, make):
    """Measured before clipping; by host or by a flag on the device."""
    callback = skipping(norm_type=norm_type)
    model, _ = fit(
        make, callback, model=make["model"](batch_losses={2: HUGE, 4: HUGE}, fused=fused), **trainer
    )

    assert stood_still(model) == [2, 4]
    assert (callback.skipped_steps, callback.seen_steps) == (2, 6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_moments_and_counters_alone(fused, make):
    """As if the batch had not been there: bitwise the run that multiplied nothing into it."""

    class Without(make["model"]):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step in (2, 4):
                for parameter in self.parameters():
                    parameter.grad = None

    expected, reference = fit(make, skipping(INF), model=Without(fused=fused))
    model, trainer = fit(
        make, skipping(), model=make["model"](batch_losses={2: HUGE, 4: HUGE}, fused=fused)
    )

    for a, b in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        ours, theirs = trainer.optimizers[0].state[b], reference.optimizers[0].state[a]
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_accumulated_gradients_are_measured_once_per_step(make):
    """With two batches per step, the sum counts."""
    callback = skipping(threshold=HUGE)
    model = make["model"](batch_losses={1: 1e9})
    fit(make, callback, model=model, batches=8, accumulate_grad_batches=2)

    assert (callback.skipped_steps, callback.seen_steps) == (1, 4)
    assert stood_still(model) == [2, 3, 4, 6]


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("skip_non_finite", [False, True])
def test_non_finite_norms_follow_the_policy(skip_non_finite, bad, make):
    """Left out, or applied: then the weights are NaN, since there is no scaler."""
    callback = skipping(skip_non_finite=skip_non_finite)
    model, _ = fit(make, callback, model=make["model"](batch_losses={2: bad}))

    assert callback.skipped_steps == int(skip_non_finite)
    assert model.second.weight.isfinite().all().item() is skip_non_finite


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skip_non_finite", [False, True])
def test_under_a_loss_scaler_non_finite_steps_are_skipped_once(
    skip_non_finite, fused, make, scaled
):
    """16-mixed: the threshold is for unscaled norms; the scaler's own skips are not ours."""
    callback = skipping(skip_non_finite=skip_non_finite)
    model = make["model"](batch_losses={2: INF, 4: 1000.0}, fused=fused)
    _, trainer = fit(make, callback, model=model, plugins=[scaled()])

    assert stood_still(model) == [2, 4]
    assert callback.skipped_steps == 1 + skip_non_finite
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**2


def test_warm_up_steps_are_applied(make):
    """The first so many optimizer steps, whatever their norm; after a resume, of the whole training."""
    callback = skipping(start_after_n_steps=3)
    model, _ = fit(make, callback)

    assert stood_still(model) == [4]
    model, _ = fit(make, GradientSkippingCallback(threshold=200.0))
    assert stood_still(model) == []
    model, _ = fit(make, skipping(start_after_n_steps=None))
    assert stood_still(model) == [2, 4]


def test_each_optimizer_has_its_own_norm(make):
    """Manual optimization: one optimizer's step is left out, the other's is not."""

    class Two(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            if batch_idx == 2:
                self.first.weight.grad.mul_(HUGE)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr=0.01) for m in (self.first, self.second)]

    callback = skipping()
    model, _ = fit(make, callback, model=Two(), batches=4)
    before, after = model.trained[1], model.trained[2]

    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert (callback.skipped_steps, callback.seen_steps) == (1, 8)


def rows(folder: Any) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("fused", [False, True])
def test_the_logged_count_is_cumulative(fused, make, tmp_path):
    """Every logging step tells how many there were until then, also those between two of them."""
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    model = make["model"](batch_losses={0: HUGE, 2: HUGE, 3: HUGE}, fused=fused)
    _, trainer = fit(make, skipping(), model=model, batches=8, logger=logger, log_every_n_steps=2)
    logged = [r for r in rows(tmp_path) if r["train/grad_skipped_steps"]]

    assert [float(r["train/grad_skipped_steps"]) for r in logged] == [1, 3, 3, 3]
    assert [float(r["train/grad_skipped_fraction"]) for r in logged] == [1 / 2, 3 / 4, 3 / 6, 3 / 8]
    assert [int(r["step"]) for r in logged] == [1, 3, 5, 7]
    assert float(trainer.callback_metrics["train/grad_skipped_steps"]) == 3


def test_two_thresholds_can_stand_side_by_side(make, tmp_path):
    """With labels, which tell their metrics and their state apart."""
    both = [skipping(200.0), skipping(1e-9, label="tight", start_after_n_steps=3)]
    model = make["model"](batch_losses={2: HUGE})
    trainer = make["trainer"](*both, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(model, make["loader"](6))

    assert [c.skipped_steps for c in both] == [1, 3]
    assert float(trainer.callback_metrics["train/grad_skipped_steps"]) == 1
    assert float(trainer.callback_metrics["train/grad_skipped_steps/tight"]) == 3


def test_counts_go_on_when_training_is_resumed(make, tmp_path):
    """Over a checkpoint and over epochs; nothing is put on the user's module."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model = make["model"](batch_losses={2: HUGE})
    trainer = make["trainer"](skipping(), saver, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(model, make["loader"](4))
    assert set(vars(model)["_modules"]) == {"first", "second"}
    callback = skipping()
    again = make["model"](batch_losses={5: HUGE})
    make["trainer"](callback, max_epochs=2, limit_val_batches=0).fit(
        again, make["loader"](4), ckpt_path=tmp_path / "epoch=0.ckpt"
    )

    assert callback.state_dict() == {"skipped_steps": 2, "seen_steps": 8}


def test_warnings_become_rarer_as_skips_become_many(make, caplog):
    """At the 1st, 2nd, 4th, 8th skip and so on."""
    caplog.set_level(logging.WARNING, logger="nshtrainer_ema")
    model = make["model"](batch_losses=dict.fromkeys(range(20), HUGE))
    fit(make, skipping(), model=model, batches=20)
    warned = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]

    assert [message.split()[0] for message in warned] == ["1", "2", "4", "8", "16"]


def test_an_infinite_threshold_skips_only_what_is_not_finite(make):
    """The finite-norm rule is off."""
    callback = skipping(INF, skip_non_finite=True)
    model, _ = fit(make, callback, model=make["model"](batch_losses={2: HUGE, 3: NAN}))

    assert stood_still(model) == [3]


def test_an_lbfgs_is_decided_once_per_step(make):
    """However often it evaluates its closure."""
    model = make["model"](torch.optim.LBFGS, lr=0.1, max_iter=3, batch_losses={1: HUGE})
    callback = skipping()
    fit(make, callback, model=model, batches=3)

    assert stood_still(model) == [1]
    assert (callback.skipped_steps, callback.seen_steps) == (1, 3)


@pytest.mark.parametrize("value", ["inf", "2", "Infinity", 1, 2.5])
def test_norm_types_may_be_written_as_text(value):
    """Text is read when the configuration is, not in the middle of training."""
    config = GradientSkippingCallbackConfig(threshold=1.0, norm_type=value)

    assert config.norm_type == float(value)
    assert GradientSkippingCallbackConfig.from_text(config.to_text("json"), "json") == config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.0},
        {"threshold": -1.0},
        {"threshold": NAN},
        {"threshold": True},
        {"threshold": "5"},
        {"threshold": 1.0, "norm_type": 0},
        {"threshold": 1.0, "norm_type": "two"},
        {"threshold": 1.0, "norm_type": True},
        {"threshold": 1.0, "norm_type": "nan"},
        {"threshold": 1.0, "start_after_n_steps": -1},
    ],
)
def test_what_makes_no_sense_is_refused(options):
    """Before any training."""
    with pytest.raises(ValidationError):
        GradientSkippingCallbackConfig(**options)


def test_an_unlucky_name_on_the_module_does_no_harm(make):
    """A module may have an attribute of the metric's name."""

    class Named(make["model"]):
        grad_skipped_steps: Tensor | str = "mine"

    model, _ = fit(make, skipping(), model=Named(batch_losses={2: HUGE}))
    assert model.grad_skipped_steps == "mine"
