"""What a skipped step brings with it: schedules that wait, runs that stop, parameters that are named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from nshtrainer.errors import ConfigError
from nshtrainer_ema import GradientSkippingCallback
from nshtrainer_ema.gradient_skipping.errors import ConsecutiveSkipsError

HUGE, NAN = 1e6, float("nan")


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    return {"model": make_model, "trainer": make_trainer, "loader": make_loader}


def skipping(**options: Any) -> GradientSkippingCallback:
    return GradientSkippingCallback(**{"threshold": 200.0, "start_after_n_steps": 0, **options})


def fit(make: Any, *callbacks: Any, model: Any, batches: int = 6, **options: Any) -> Any:
    trainer = make["trainer"](*callbacks, limit_val_batches=0, **options)
    trainer.fit(model, make["loader"](batches))
    return trainer


def scheduled(base: Any, *, interval: str = "step", frequency: int = 1) -> Any:
    """A model whose learning rate falls by a tenth at each advance."""

    class Scheduled(base):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            settings = {"scheduler": schedule, "interval": interval, "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": settings}

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            self.rates = [*getattr(self, "rates", []), self.lr_schedulers().last_epoch]

    return Scheduled


# ---- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaler", [False, True])
def test_schedules_wait_for_a_step_that_is_left_out(scaler, fused, hold, make, scaled):
    """Only then, and only if they are told to; a NaN counts, under a loss scaler too."""
    model = scheduled(make["model"])(batch_losses={2: 1e3, 4: NAN}, fused=fused)
    callback = skipping(hold_scheduler=hold, skip_non_finite=True)
    options = {"plugins": [scaled()]} if scaler else {}
    trainer = fit(make, callback, model=model, **options)

    assert callback.skipped_steps == 2
    assert model.rates == ([1, 2, 2, 3, 3, 4] if hold else [1, 2, 3, 4, 5, 6])
    assert trainer.global_step == 6
    assert [config.frequency for config in trainer.lr_scheduler_configs] == [1]


def test_schedules_that_advance_seldom_miss_their_turn(make):
    """With a frequency of 2, the advance that falls on a left-out step is left out."""
    model = scheduled(make["model"], frequency=2)(batch_losses={1: HUGE, 2: HUGE})
    trainer = fit(make, skipping(hold_scheduler=True), model=model)

    assert model.rates == [0, 0, 0, 1, 1, 2]
    assert trainer.lr_scheduler_configs[0].frequency == 2


def test_schedules_wait_for_whole_steps_while_accumulating(make):
    """Two batches a step: the advance of the left-out step is missing, no other."""
    model = scheduled(make["model"])(batch_losses={1: 1e9})
    fit(make, skipping(hold_scheduler=True), model=model, batches=8, accumulate_grad_batches=2)

    assert model.rates == [0, 1, 1, 1, 1, 2, 2, 3]


def test_a_held_schedule_is_let_go_when_training_fails(make):
    """An exception right after a left-out step leaves Lightning's settings as they were."""

    class Failing(scheduled(make["model"])):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 2:
                self.trainer.found = self.trainer.lr_scheduler_configs[0].frequency
                raise KeyError("planted")

    model = Failing(batch_losses={2: HUGE})
    trainer = make["trainer"](skipping(hold_scheduler=True), limit_val_batches=0)
    with pytest.raises(KeyError, match="planted"):
        trainer.fit(model, make["loader"](6))

    assert trainer.found > 10**9
    assert trainer.lr_scheduler_configs[0].frequency == 1


def test_schedules_of_epochs_go_on_and_that_is_said(make, caplog):
    """A setting without effect is no secret."""
    caplog.set_level(logging.WARNING, logger="nshtrainer_ema")
    model = scheduled(make["model"], interval="epoch")(batch_losses={5: HUGE})
    fit(make, skipping(hold_scheduler=True), model=model, max_epochs=2)

    assert model.rates[-1] == 2
    assert sum("nothing to hold" in r.getMessage() for r in caplog.records) == 1


def test_manual_optimization_cannot_hold_schedules(make):
    """The module advances them by itself; the error says so before training."""

    class Manual(make["model"]):
        automatic_optimization = False

    with pytest.raises(ConfigError, match="optimizes manually"):
        fit(make, skipping(hold_scheduler=True), model=Manual())


def test_a_resumed_schedule_goes_on_where_it_was_held(make, tmp_path):
    """Bitwise as without an interruption."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    models = [scheduled(make["model"])(batch_losses={2: HUGE, 7: HUGE}) for _ in range(2)]
    fit(
        make,
        skipping(hold_scheduler=True),
        saver,
        model=models[0],
        max_epochs=2,
        enable_checkpointing=True,
    )
    trainer = make["trainer"](skipping(hold_scheduler=True), max_epochs=2, limit_val_batches=0)
    trainer.fit(models[1], make["loader"](6), ckpt_path=tmp_path / "epoch=0.ckpt")

    assert models[0].rates[-1] == models[1].rates[-1] == 10
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


# ---- too many in a row --------------------------------------------------------------------------


def test_so_many_left_out_steps_in_a_row_stop_training(make):
    """At the third; two with a good one between them do not count as three."""
    model = make["model"](batch_losses=dict.fromkeys([1, 2, 4, 5, 6, 7], HUGE))
    callback = skipping(max_consecutive=3)
    said = r"3 optimizer steps in a row .* above 200\); fewer than .*max_consecutive, 3.*gradients were"
    with pytest.raises(ConsecutiveSkipsError, match=said):
        fit(make, callback, model=model, batches=10)

    assert (callback.skipped_steps, callback.seen_steps) == (5, 7)


@pytest.mark.parametrize(("every", "stops_after"), [(1, 7), (4, 8), (1000, 10)])
def test_where_only_the_device_knows_it_stops_at_the_next_look(every, stops_after, make):
    """At a logging step or the end of the epoch, even if the row has ended by then."""
    model = make["model"](batch_losses=dict.fromkeys([1, 2, 4, 5, 6], HUGE), fused=True)
    callback = skipping(max_consecutive=3)
    with pytest.raises(ConsecutiveSkipsError, match="3 optimizer steps in a row"):
        fit(make, callback, model=model, batches=10, log_every_n_steps=every)

    assert callback.seen_steps == stops_after


@pytest.mark.parametrize("fused", [False, True])
def test_shorter_rows_do_not_stop_training(fused, make):
    """However many there are in all; without the option nothing ever does."""
    losses = dict.fromkeys([i for i in range(12) if i % 3], HUGE)
    callback = skipping(max_consecutive=3)
    fit(make, callback, model=make["model"](batch_losses=losses, fused=fused), batches=12)
    assert callback.skipped_steps == 8
    everything = dict.fromkeys(range(12), HUGE)
    callback = skipping()
    fit(make, callback, model=make["model"](batch_losses=everything, fused=fused), batches=12)

    assert callback.skipped_steps == 12


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_goes_on_when_training_is_resumed(fused, make, tmp_path):
    """Two before the checkpoint and one after are three."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    losses = dict.fromkeys([4, 5, 6], HUGE)
    model = make["model"](batch_losses=losses, fused=fused)
    fit(make, skipping(max_consecutive=3), saver, model=model, enable_checkpointing=True)
    callback = skipping(max_consecutive=3)
    trainer = make["trainer"](callback, max_epochs=2, limit_val_batches=0, log_every_n_steps=1)
    model = make["model"](batch_losses=losses, fused=fused)
    with pytest.raises(ConsecutiveSkipsError):
        trainer.fit(model, make["loader"](6), ckpt_path=tmp_path / "epoch=0.ckpt")

    assert callback.seen_steps == 7


def test_rows_are_counted_for_each_optimizer(make):
    """One that is always left out stops the run, though the other steps in between."""

    class Two(make["model"]):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                self.first.weight.grad.mul_(HUGE)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr=0.01) for m in (self.first, self.second)]

    callback = skipping(max_consecutive=3)
    with pytest.raises(ConsecutiveSkipsError):
        fit(make, callback, model=Two())

    assert (callback.skipped_steps, callback.seen_steps) == (3, 5)


# ---- what is named ------------------------------------------------------------------------------


class Blowing(Callback):
    """Multiplies one parameter's gradient at every step."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        pl_module.first.bias.grad.mul_(self.factor)


@pytest.mark.parametrize("factor", [1e7, NAN])
@pytest.mark.parametrize("scaler", [False, True])
def test_the_largest_gradients_are_named_in_the_warning(scaler, factor, make, caplog, scaled):
    """Largest first, with unscaled norms; what is not finite before all numbers."""
    caplog.set_level(logging.WARNING, logger="nshtrainer_ema")
    options = {"plugins": [scaled()]} if scaler else {}
    fit(
        make,
        Blowing(factor),
        skipping(skip_non_finite=True),
        model=make["model"](),
        batches=1,
        **options,
    )
    (warned,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]

    assert "largest gradients were those of first.bias (" in warned
    assert warned.count("(") == 4  # the reason and three parameters


def test_a_fused_optimizer_names_none(make, caplog):
    """Looking for them would make the host wait at every step."""
    caplog.set_level(logging.WARNING, logger="nshtrainer_ema")
    fit(
        make,
        Blowing(1e7),
        skipping(),
        model=make["model"](fused=True),
        batches=1,
        log_every_n_steps=1,
    )
    (warned,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]

    assert "first.bias" not in warned
