"""Training with a policy: what it leaves out, clips or stops at, and what it learns from."""

from __future__ import annotations

import csv
import logging
import math
import pickle
import statistics as plain
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientRequest
from nshtrainer.testing import HostSyncs
from nshtrainer_ema import GradientSkippingCallback
from nshtrainer_ema.gradient_skipping.errors import GradientSpikeError

INF, NAN = math.inf, math.nan
SGD = {"optimizer": torch.optim.SGD, "lr": 1e-3}
ZSCORE = {"policy": "zscore", "warmup_steps": 8, "sigmas": 8.0}
SIGMA = {"policy": "sigma", "warmup_steps": 8, "window": 12, "sigmas": 8.0}
PERCENTILE = {
    "policy": "percentile", "warmup_steps": 8, "window": 40, "percentile": 80, "percentile_factor": 8.0,
}  # fmt: skip
POLICIES = {"zscore": ZSCORE, "sigma": SIGMA, "percentile": PERCENTILE}


class Recorder(Callback):
    """Keeps, for each step, the norm before and after clipping."""

    def __init__(self, norm_type: float = 2.0) -> None:
        self.norm_type = norm_type
        self.norms: list[float] = []
        self.clipped: list[float | None] = []
        self.indices: list[int] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        attach(trainer, "recorder").gradients.register(
            "recorder",
            request=lambda step: GradientRequest(totals=(self.norm_type,), clipped=True),
            observe=self.observe,
        )

    def observe(self, step: Any) -> None:
        self.indices.append(step.optimizer_index)
        self.norms.append(step.norms.totals[self.norm_type].item())
        ran = step.clipped is not None
        self.clipped.append(step.clipped.totals[self.norm_type].item() if ran else None)


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    return {"model": make_model, "trainer": make_trainer, "loader": make_loader}


def skipping(**options: Any) -> GradientSkippingCallback:
    return GradientSkippingCallback(**{"start_after_n_steps": 0, **options})


def fit(make: Any, *callbacks: Any, model: Any, batches: int = 24, **options: Any) -> Any:
    trainer = make["trainer"](*callbacks, limit_val_batches=0, **options)
    trainer.fit(model, make["loader"](batches))
    return trainer


def stood_still(model: Any) -> list[int]:
    history = model.trained
    return [
        i
        for i in range(1, len(history))
        if all(torch.equal(a, b) for a, b in zip(history[i - 1], history[i], strict=True))
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---- what is left out ------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_spikes_are_left_out_and_nothing_else(policy, fused, make):
    """Two that follow one another, and one later: the first does not hide the others."""
    callback = skipping(**POLICIES[policy])
    model = make["model"](**SGD, batch_losses={12: 1e4, 13: 1e3, 20: 1e4}, fused=fused)
    fit(make, callback, model=model)

    assert stood_still(model) == [12, 13, 20]
    assert (callback.skipped_steps, callback.seen_steps) == (3, 24)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
def test_steps_are_left_out_by_the_published_rule(norm_type, make):
    """ZClip's, in plain Python, over the norms that were really measured."""
    callback = skipping(policy="zscore", warmup_steps=5, sigmas=1.5, norm_type=norm_type)
    recorder = Recorder(norm_type)
    model = make["model"](**SGD, batch_losses={9: 30.0, 15: 5.0})
    fit(make, callback, recorder, model=model, batches=60)
    seen: list[float] = []
    mean = variance = 0.0
    expected: list[int] = []
    for i, norm in enumerate(recorder.norms):
        if len(seen) >= 5 and norm > mean + 1.5 * math.sqrt(variance):
            expected.append(i)
            continue
        seen.append(norm)
        if len(seen) <= 5:
            mean, variance = plain.fmean(seen), plain.pvariance(seen)
        else:
            mean = 0.97 * mean + 0.03 * norm
            variance = 0.97 * variance + 0.03 * (norm - mean) ** 2

    assert len(expected) > 3
    assert stood_still(model) == expected
    state = callback.state_dict()["statistics"][0]
    assert state["count"] == len(seen)
    assert state["mean"].item() == pytest.approx(mean, rel=1e-9)
    assert state["variance"].item() == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("policy", ["zscore", "sigma"])
@pytest.mark.parametrize("bad", [1e5, INF, NAN])
def test_spikes_and_non_finite_norms_are_kept_out_of_the_statistics(policy, bad, make):
    """They are those of a run in which the batch had no loss at all."""

    class Without(make["model"]):
        def on_after_backward(self) -> None:
            if self.global_step == 14:
                for parameter in self.parameters():
                    parameter.grad = None

    with_spike, without = (skipping(**POLICIES[policy], skip_non_finite=True) for _ in range(2))
    fit(make, with_spike, model=make["model"](**SGD, batch_losses={14: bad}))
    fit(make, without, model=Without(**SGD))

    assert with_spike.skipped_steps == 1
    assert with_spike.state_dict()["statistics"][0]["count"] == 23
    assert same(with_spike.state_dict()["statistics"], without.state_dict()["statistics"])


def test_a_percentile_counts_a_spike_as_one_norm_among_others(make):
    """It moves the limit by one rank, and what is not finite does not count."""
    callback = skipping(**PERCENTILE)
    model = make["model"](**SGD, batch_losses={14: 1e5})
    fit(make, callback, model=model)
    state = callback.state_dict()["statistics"][0]

    assert stood_still(model) == [14]
    assert state["count"] == 24
    assert (state["norms"] > 1e3).sum() == 1


def test_the_first_steps_are_applied_and_learnt_from(make):
    """`start_after_n_steps` is for the decision, not for the statistics."""
    callback = skipping(**ZSCORE, start_after_n_steps=16)
    model = make["model"](**SGD, batch_losses={12: 50.0, 20: 1e6})
    fit(make, callback, model=model)

    assert stood_still(model) == [20]
    assert callback.state_dict()["statistics"][0]["count"] == 23


def test_a_threshold_holds_beside_a_policy(make):
    """From the first step on; what is above it is never learnt from."""
    callback = skipping(**ZSCORE, threshold=200.0)
    model = make["model"](**SGD, batch_losses={3: 1e4, 15: 1e4})
    fit(make, callback, model=model)

    assert stood_still(model) == [3, 15]
    assert callback.state_dict()["statistics"][0]["count"] == 22


def test_a_model_without_gradients_teaches_nothing(make):
    """A part that is not trained at first has norm 0, and is not stuck when its training begins."""

    class Late(make["model"]):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if self.global_step >= 12 else 0.0 * loss

    callback = skipping(**ZSCORE)
    model = Late(**SGD)
    fit(make, callback, model=model)

    assert stood_still(model) == list(range(1, 12))
    assert callback.skipped_steps == 0
    assert callback.state_dict()["statistics"][0]["count"] == 12


def test_accumulated_batches_are_one_norm(make):
    """Four batches a step: six norms."""
    callback = skipping(policy="zscore", warmup_steps=2)
    recorder = Recorder()
    fit(make, callback, recorder, model=make["model"](**SGD), accumulate_grad_batches=4)
    state = callback.state_dict()["statistics"][0]

    assert callback.seen_steps == state["count"] == len(recorder.norms) == 6


class TwoOptimizers:
    """Mixed into a model: manual optimization, the second with gradients of another size."""

    def prepare(self) -> Any:
        self.automatic_optimization = False
        return self

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            factor = self.batch_losses.get((index, batch_idx), 1.0)
            self.manual_backward(self.loss(batch) * 100.0**index * factor)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=1e-5) for m in (self.first, self.second)]


def test_each_optimizer_has_statistics_of_its_own(make, tmp_path):
    """What is usual for one is a spike for the other; limits are logged apart."""

    class Two(TwoOptimizers, make["model"]):
        pass

    callback, recorder = skipping(**ZSCORE), Recorder()
    model = Two(batch_losses={(0, 15): 100.0, (1, 18): 50.0}).prepare()
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(make, callback, recorder, model=model, logger=logger, log_every_n_steps=1)
    state = callback.state_dict()["statistics"]
    left_out = [i for i, clipped in enumerate(recorder.clipped) if clipped is None]

    assert left_out == [2 * 15, 2 * 18 + 1]
    assert {index: int(s["count"]) for index, s in state.items()} == {0: 23, 1: 23}
    assert state[1]["mean"] > 20 * state[0]["mean"]
    limits = [logged(tmp_path, f"train/optimizer_{i}/grad_norm_limit")[-1] for i in (0, 1)]
    assert limits[1] > 20 * limits[0]


def test_an_lbfgs_teaches_one_norm_a_step(make):
    """However often it evaluates its closure."""
    callback = skipping(policy="zscore", warmup_steps=2, sigmas=100.0)
    model = make["model"](torch.optim.LBFGS, lr=0.1, max_iter=3)
    fit(make, callback, model=model, batches=5)

    assert callback.state_dict()["statistics"][0]["count"] == 5


# ---- clip and raise ---------------------------------------------------------------------------


@pytest.mark.parametrize("clip_val", [None, 0.05], ids=["alone", "then Lightning's"])
@pytest.mark.parametrize("policy", POLICIES)
def test_clip_scales_down_to_the_limit(policy, clip_val, make, tmp_path):
    """A spike is applied with the largest norm that is none; Lightning's own clipping comes after."""
    callback, recorder = skipping(**POLICIES[policy], action="clip"), Recorder()
    model = make["model"](**SGD, batch_losses={15: 1e4})
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(
        make, callback, recorder, model=model, gradient_clip_val=clip_val, logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    limits = logged(tmp_path, "train/grad_norm_limit")
    most = clip_val or INF

    assert (callback.clipped_steps, callback.skipped_steps) == (1, 0)
    assert stood_still(model) == []
    assert limits[:8] == [INF] * 8
    assert recorder.norms[15] > limits[15]
    for norm, clipped, limit in zip(recorder.norms, recorder.clipped, limits, strict=True):
        assert clipped == pytest.approx(min(norm, limit, most), rel=1e-4)
    assert float(trainer.callback_metrics["train/grad_clipped_steps"]) == 1
    fraction = float(trainer.callback_metrics["train/grad_clipped_fraction"])
    assert fraction == pytest.approx(1 / 24)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaler", [False, True])
def test_clip_works_where_gradients_are_still_scaled(scaler, fused, make, scaled):
    """As torch's clipping, which Lightning refuses to a fused optimizer with a GradScaler."""

    def plugins() -> dict[str, Any]:
        return {"plugins": [scaled()]} if scaler else {}

    ours = make["model"](**SGD, batch_losses={3: 10.0}, fused=fused)
    fit(make, skipping(threshold=0.5, action="clip"), model=ours, batches=6, **plugins())
    theirs = make["model"](**SGD, batch_losses={3: 10.0})
    fit(make, model=theirs, batches=6, gradient_clip_val=0.5, **plugins())

    for a, b in zip(ours.trained, theirs.trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_smaller_of_two_limits_is_clipped_to(make):
    """Two callbacks that clip do not clip twice."""
    recorder = Recorder()
    both = [
        skipping(threshold=0.5, action="clip"),
        skipping(threshold=0.2, action="clip", label="tight"),
    ]
    fit(make, *both, recorder, model=make["model"](**SGD), batches=4)

    assert recorder.clipped == pytest.approx([0.2] * 4, rel=1e-5)


def test_raise_stops_before_the_step_and_names_the_culprit(make):
    """Weights and statistics are those of the step before."""

    class Spiky(make["model"]):
        def on_after_backward(self) -> None:
            if self.global_step == 15:
                self.second.weight.grad.mul_(1e4)

    callback = skipping(**ZSCORE, action="raise")
    model = Spiky(**SGD)
    with pytest.raises(
        GradientSpikeError, match=r"step 15.*its zscore limit.*of second\.weight \("
    ):
        fit(make, callback, model=model)

    assert len(model.trained) == 15
    assert all(
        torch.equal(a, b) for a, b in zip(model.trained[-1], model.parameters(), strict=True)
    )
    assert callback.state_dict()["statistics"][0]["count"] == 15


def test_raise_lets_pass_what_is_usual(make):
    """And what is not finite stays a matter of `skip_non_finite`."""
    callback = skipping(**SIGMA, action="raise", skip_non_finite=True)
    model = make["model"](**SGD, batch_losses={15: NAN})
    fit(make, callback, model=model)

    assert stood_still(model) == [15]
    assert (callback.skipped_steps, callback.seen_steps) == (1, 24)


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["skip", "clip", "raise"])
@pytest.mark.parametrize("skip_non_finite", [False, True])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_non_finite_norms_follow_the_option_at_every_precision(
    fused, precision, bad, skip_non_finite, action, make, scaled
):
    """Left out if it says so; else applied, or left to the loss scaler, whatever the action."""
    callback = skipping(threshold=1e9, skip_non_finite=skip_non_finite, action=action)
    model = make["model"](batch_losses={2: bad}, fused=fused)
    is_scaled = precision == "16-mixed"
    options = {"plugins": [scaled()]} if is_scaled else {"precision": precision}
    fit(make, callback, model=model, batches=5, **options)

    assert callback.skipped_steps == int(skip_non_finite)
    assert callback.clipped_steps == 0
    is_kept = skip_non_finite or is_scaled
    assert model.second.weight.isfinite().all().item() is is_kept
    assert (2 in stood_still(model)) is is_kept


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_policy_sees_unscaled_norms_at_every_precision(fused, precision, make, scaled):
    """The spike is left out, and the loss scale is no part of the statistics."""
    callback, recorder = skipping(**ZSCORE), Recorder()
    model = make["model"](**SGD, batch_losses={15: 200.0}, fused=fused)
    options = {"plugins": [scaled()]} if precision == "16-mixed" else {"precision": precision}
    fit(make, callback, recorder, model=model, **options)
    state = callback.state_dict()["statistics"][0]

    assert callback.skipped_steps == 1
    assert 15 in stood_still(model)
    assert min(recorder.norms) < state["mean"] < sorted(recorder.norms)[-2]


# ---- the run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["skip", "clip"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(policy, fused, action, make, tmp_path):
    """Saved in the middle of the statistics: weights, counts, limits and decisions go on."""
    spikes = {10: 1e4, 17: 1e4, 18: 1e4}
    options = {**POLICIES[policy], "action": action, "skip_non_finite": True, "max_consecutive": 9}
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    straight, resumed = skipping(**options), skipping(**options)
    one, other = (make["model"](batch_losses=spikes, fused=fused) for _ in range(2))
    common = {"batches": 12, "enable_checkpointing": True}
    fit(make, straight, saver, model=one, max_epochs=2, **common)
    trainer = make["trainer"](resumed, max_epochs=2, limit_val_batches=0)
    trainer.fit(other, make["loader"](12), ckpt_path=tmp_path / "epoch=0.ckpt")

    assert straight.skipped_steps + straight.clipped_steps == 3
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(list(other.parameters()), list(one.parameters()))
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["callbacks"]["nshtrainer.gradient_skipping"]["seen_steps"] == 12


@pytest.mark.parametrize(
    ("before", "after"),
    [({"threshold": 1e9}, ZSCORE), (SIGMA, ZSCORE), (SIGMA, {**SIGMA, "window": 13})],
    ids=["no policy", "another policy", "another window"],
)
def test_statistics_that_do_not_fit_begin_anew_and_that_is_said(
    before, after, make, tmp_path, caplog
):
    """A resumed run with another policy warms up again; its counts go on."""
    caplog.set_level(logging.WARNING, logger="nshtrainer_ema")
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(
        make,
        skipping(**before),
        saver,
        model=make["model"](**SGD),
        batches=12,
        enable_checkpointing=True,
    )
    callback = skipping(**after)
    trainer = make["trainer"](callback, max_epochs=2, limit_val_batches=0)
    trainer.fit(make["model"](**SGD), make["loader"](12), ckpt_path=tmp_path / "epoch=0.ckpt")

    assert callback.seen_steps == 24
    assert callback.state_dict()["statistics"][0]["count"] == 12
    assert [r.getMessage() for r in caplog.records if "begin anew" in r.getMessage()] != []


def test_another_module_is_not_judged_by_the_first_one(make):
    """A callback that trains a second module warms up again; for the same module it goes on."""
    callback = skipping(**ZSCORE)
    model = make["model"](**SGD)
    fit(make, callback, model=model, batches=10)
    fit(make, callback, model=model, batches=10)
    assert callback.state_dict()["statistics"][0]["count"] == 20
    other = make["model"](torch.optim.SGD, lr=1e-7, batch_losses=dict.fromkeys(range(10), 1e3))
    fit(make, callback, model=other, batches=10)

    assert callback.skipped_steps == 0
    assert callback.state_dict()["statistics"][0]["count"] == 10


def test_a_pickled_callback_takes_its_statistics_along(make):
    """Processes that are spawned get a copy."""
    callback = skipping(**SIGMA)
    fit(make, callback, model=make["model"](**SGD), batches=10)
    copied = pickle.loads(pickle.dumps(callback))

    assert same(copied.state_dict(), callback.state_dict())


def test_nothing_is_attached_to_the_module(make):
    """Neither modules nor attributes."""
    plain, ours = make["model"](**SGD), make["model"](**SGD)
    fit(make, model=plain)
    fit(make, skipping(**ZSCORE, max_consecutive=5), model=ours)

    assert vars(ours).keys() == vars(plain).keys()
    assert ours._modules.keys() == plain._modules.keys()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (True, {"max_consecutive": 100}),
        (True, {"skip_non_finite": True}),
        (True, {"action": "clip"}),
        (False, {"action": "clip"}),
    ],
    ids=["skip", "non-finite", "clip", "clip, not fused"],
)
def test_the_host_does_not_wait_for_the_device(policy, fused, options, make):
    """Spike or not; where the optimizer takes `found_inf`, or nothing is ever left out."""

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            syncs.section = trainer.global_step or None

    class Unwatch(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            syncs.section = None

    callback = skipping(**POLICIES[policy], **options)
    # Lightning's progress reads nothing between these two; a plain SGD neither.
    callbacks = [Watch(), callback, Unwatch(save_top_k=0)]
    model = make["model"](**SGD, batch_losses={15: 1e4}, fused=fused)
    with HostSyncs() as syncs:
        fit(make, *callbacks, model=model, enable_checkpointing=True, log_every_n_steps=1000)

    assert syncs.counts == {}
    assert callback.skipped_steps + callback.clipped_steps == 1


def logged(folder: Any, name: str) -> list[float]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]
