from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from nshtrainer import Trainer
from nshtrainer_wandb import WandbWatchCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # new torch

NAMES = {"layer.weight", "layer.bias"}


def _watched(run, kind: str) -> set[str]:
    keys = {key for row in run.history for key in row}
    return {k.removeprefix(f"{kind}/").split("/_")[0] for k in keys if k.startswith(f"{kind}/")} - {
        f"{n}/{part}" for n in NAMES for part in ("values", "bins", "packedBins")
    }


def _logger(**watch):
    return {"name": "wandb", "watch": {"log_freq": 2, **watch}, "log_code": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("log", "gradients", "parameters"),
    [
        ("gradients", NAMES, set()),
        ("parameters", set(), NAMES),
        ("all", NAMES, NAMES),
        (None, set(), set()),
    ],
)
def test_what_is_asked_for_is_recorded(
    log, gradients, parameters, make_config, model, batches, written
):
    """Histograms of gradients and parameters arrive, though `training_step` never calls `forward`."""
    Trainer(make_config(loggers=[_logger(log=log)])).fit(model, batches)

    (run,) = written()
    assert _watched(run, "gradients") == gradients
    assert _watched(run, "parameters") == parameters


@pytest.mark.slow
def test_records_come_every_log_freq_batches(make_config, model, batches, written):
    """Four batches at a frequency of 2 are two records, of the batches 2 and 4."""
    Trainer(make_config(loggers=[_logger(log="all")])).fit(model, batches)

    (run,) = written()
    for key in ("gradients/layer.bias/_type", "parameters/layer.bias/_type"):
        steps = [row["trainer/global_step"] for row in run.history if key in row]
        assert steps == [1, 3]


@pytest.mark.slow
def test_same_module_is_watched_in_a_second_run_under_the_same_names(
    make_config, model, batches, written
):
    """Nothing of the first run is left on the module, and names have no counter in them."""
    for name in ("first", "second"):
        config = make_config(loggers=[_logger(log_graph=True, method="hooks")], id=name)
        Trainer(config).fit(model, batches)

    first, second = written()
    assert _watched(first, "gradients") == _watched(second, "gradients") == NAMES
    assert "graph_0" in {key.split("/")[0] for key in first.summary}


@pytest.mark.slow
def test_nothing_stays_on_the_module_after_an_exception(make_config, failing_model, batches):
    """Hooks and marks are gone, and the module can be pickled."""
    config = make_config(loggers=[_logger(log="all", log_graph=True, method="hooks")])

    with pytest.raises(RuntimeError, match="the model failed"):
        Trainer(config).fit(failing_model, batches)

    assert not any("_wandb" in name for m in failing_model.modules() for name in m.__dict__)
    assert not any(m._forward_hooks for m in failing_model.modules())
    assert not any(p._backward_hooks for p in failing_model.parameters())
    assert pickle.dumps(failing_model.layer)


@pytest.mark.slow
def test_model_chooses_what_is_watched(make_config, model, batches, written):
    """`wandb_log_module` of the model names the module."""
    type(model).wandb_log_module = lambda self: self.layer
    try:
        Trainer(make_config(loggers=[_logger()])).fit(model, batches)
    finally:
        del type(model).wandb_log_module

    (run,) = written()
    keys = {key for row in run.history for key in row}
    assert any(key.startswith("gradients/weight") for key in keys)
    assert not any(key.startswith("gradients/layer") for key in keys)


@pytest.mark.slow
def test_watching_changes_no_result(make_config, model, batches):
    """Weights are bitwise those of a run without W&B."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    Trainer(make_config(loggers=[_logger(log="all")])).fit(model, batches)
    watched = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)

    Trainer(make_config()).fit(model, batches)

    assert all(torch.equal(watched[k], v) for k, v in model.state_dict().items())


def test_plain_trainer_without_wandb_is_told(tmp_path, model, batches, caplog):
    """By hand, on Lightning's trainer, without a W&B logger: one warning, and training goes on."""
    trainer = LightningTrainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[WandbWatchCallback(log="all")],
    )  # fmt: skip

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        trainer.fit(model, batches)

    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no W&B logger" in warnings[0]
    assert trainer.global_step == 4


def _extremes(run, name: str) -> dict[int, tuple[float, float]]:
    """Step -> smallest and largest element of each record of *name*, up to W&B's packing of bins."""
    found = {}
    for row in run.history:
        if f"{name}/packedBins/min" in row:
            low, width, count = (row[f"{name}/packedBins/{k}"] for k in ("min", "size", "count"))
            found[row["trainer/global_step"]] = (low, low + width * count)
        elif f"{name}/bins" in row:
            bins = row[f"{name}/bins"]
            found[row["trainer/global_step"]] = (bins[0], bins[-1])
    return found


class Seen(Callback):
    """Notes, without wandb, what an optimizer has used: the gradients right after each step."""

    def __init__(self) -> None:
        self.extremes: dict[str, list[tuple[float, float]]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for name, parameter in pl_module.named_parameters():
            grad = parameter.grad
            if grad is not None:
                self.extremes.setdefault(name, []).append((float(grad.min()), float(grad.max())))


@pytest.mark.slow
def test_gradients_are_those_that_the_optimizer_used(make_config, model, batches, written):
    """Accumulated over batches and clipped; two batches a step are two steps in an epoch of four."""
    seen = Seen()
    config = make_config(
        loggers=[_logger(log_freq=1)], accumulate_grad_batches=2, gradient_clip_val=0.5
    )

    Trainer(config, callbacks=[seen]).fit(model, batches)

    (run,) = written()
    recorded = _extremes(run, "gradients/layer.weight")
    assert list(recorded) == [0, 1]
    for step, values in recorded.items():
        assert values == pytest.approx(seen.extremes["layer.weight"][2 * step + 1])


class Compiled(LightningModule):
    """A compiled part beside one that is not; the backend is the one that needs no compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.compile(torch.nn.Linear(4, 4), backend="eager")
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(self.layer(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["optimizer_step", "hooks"])
def test_compiled_module_is_watched_under_plain_names(
    method, make_config, batches, written, caplog
):
    """Hooks are said to be of no use, and the names are those of the module that was compiled."""
    watch = {"log": "all", "method": method, "log_graph": method == "hooks"}

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        Trainer(make_config(loggers=[_logger(**watch)])).fit(Compiled(), batches)

    (run,) = written()
    names = {key.split("/")[1] for row in run.history for key in row if "/_type" in key}
    assert names == {"layer.weight", "layer.bias", "head.weight", "head.bias"}
    assert ("Set `method: optimizer_step`" in caplog.text) is (method == "hooks")


class TwoOptimizers(LightningModule):
    """Manual optimization; the second optimizer steps at every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for index, (optimizer, part) in enumerate(
            zip(self.optimizers(), (self.first, self.second), strict=True)
        ):
            if index == 0 or batch_idx % 2:
                optimizer.zero_grad()
                self.manual_backward(part(batch).mean())
                optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(p.parameters(), lr=0.01) for p in (self.first, self.second)]


@pytest.mark.slow
def test_each_optimizer_is_recorded_when_it_steps(make_config, batches, written):
    """Manual optimization on a plain trainer's terms; parameters come once a step, all of them."""
    Trainer(make_config(loggers=[_logger(log="all", log_freq=1)])).fit(TwoOptimizers(), batches)

    (run,) = written()
    assert list(_extremes(run, "gradients/first.weight")) == [0, 1, 2, 3]
    assert list(_extremes(run, "gradients/second.weight")) == [1, 3]
    assert list(_extremes(run, "parameters/second.weight")) == [0, 1, 2, 3]


class Skip(Callback):
    """Skips the step of one batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def setup(self, trainer, pl_module, stage) -> None:
        from nshtrainer.runtime.driver import attach
        from nshtrainer.runtime.gradients import StepOutcome

        attach(trainer, "skip").gradients.register(
            "skip",
            decide=lambda step: StepOutcome(True, "test") if step.step == self.batch else None,
        )


@pytest.mark.slow
def test_record_of_a_skipped_step_is_made_at_the_next_one(make_config, model, batches, written):
    """A step that was skipped used no gradients; the record that was due is not lost."""
    Trainer(make_config(loggers=[_logger()]), callbacks=[Skip(1)]).fit(model, batches)

    (run,) = written()
    assert list(_extremes(run, "gradients/layer.weight")) == [2, 3]


class Copies(Callback):
    """Copies the module and the trainer's callbacks in the middle of training."""

    def __init__(self) -> None:
        self.copies: list[object] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        layers = pl_module.layer
        watch = next(c for c in trainer.callbacks if isinstance(c, WandbWatchCallback))
        for thing in (layers, watch):
            self.copies += [copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["optimizer_step", "hooks"])
def test_module_and_callback_can_be_copied_while_watched(method, make_config, model, batches):
    """By deepcopy, as for an average of the weights, and by pickle."""
    copies = Copies()

    Trainer(
        make_config(loggers=[_logger(log="all", method=method)], limit_train_batches=2),
        callbacks=[copies],
    ).fit(model, batches)

    assert len(copies.copies) == 8
    assert not any(p._backward_hooks for c in copies.copies[:2] for p in c.parameters())


@pytest.mark.slow
def test_plain_trainer_with_lightnings_logger_is_watched(
    tmp_path, model, batches, written, project
):
    """Nothing of it needs our trainer or our logger; a second fit goes on with the same module."""
    trainer = LightningTrainer(
        accelerator="cpu", max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        logger=WandbLogger(save_dir=project, project="p"),
        callbacks=[WandbWatchCallback(log_freq=2, log="all")],
    )  # fmt: skip
    trainer.fit(model, batches)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches)

    import wandb

    wandb.finish()
    (run,) = written()
    assert list(_extremes(run, "gradients/layer.weight")) == [1, 3, 5, 7]


class Pipeline(Callback):
    """Notes at each batch whether the gradient pipeline runs, and its hooks on the optimizer."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        from nshtrainer.runtime.driver import find_driver

        (optimizer,) = trainer.optimizers
        active = find_driver(trainer).gradients.active
        self.seen.append((active, len(optimizer._optimizer_step_post_hooks)))


@pytest.mark.slow
def test_steps_without_a_record_run_without_the_pipeline(make_config, model, batches):
    """Between records nothing of it is called, and nothing is on the optimizer."""
    pipeline = Pipeline()

    Trainer(make_config(loggers=[_logger()]), callbacks=[pipeline]).fit(model, batches)

    assert pipeline.seen == [(False, 0), (True, 1), (False, 0), (True, 1)]


@pytest.mark.slow
def test_run_that_is_too_short_for_a_record_says_so(make_config, model, batches, written, caplog):
    """Four steps have no step 1000; nobody is left to wonder where the histograms are."""
    with caplog.at_level(logging.INFO, "nshtrainer_wandb"):
        Trainer(make_config(loggers=[_logger(log_freq=1000)])).fit(model, batches)

    (run,) = written()
    assert _watched(run, "gradients") == set()
    assert "ended before its step 1000" in caplog.text


@pytest.mark.slow
def test_trouble_with_wandb_does_not_end_training(make_config, model, batches, caplog, monkeypatch):
    """A record that cannot be made is one warning, however many there are."""
    import wandb

    def refuse(*args, **kwargs):
        raise ValueError("no histograms today")

    monkeypatch.setattr(wandb, "Histogram", refuse)
    trainer = Trainer(make_config(loggers=[_logger(log_freq=1)]))

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        trainer.fit(model, batches)

    assert trainer.global_step == 4
    assert caplog.text.count("no histograms today") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_recorded_without_the_loss_scale(fused, make_config, model, batches, written):
    """With 16-mixed and a real GradScaler; a fused optimizer takes the scale off by itself."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    expected = copy.deepcopy(model.layer)
    expected(torch.ones(2, 4)).square().mean().backward()

    config = make_config(loggers=[_logger(log_freq=1)], limit_train_batches=1)
    Trainer(config, plugins=[precision]).fit(model, batches)

    (run,) = written()
    (recorded,) = _extremes(run, "gradients/layer.weight").values()
    grad = expected.weight.grad
    assert recorded == pytest.approx((float(grad.min()), float(grad.max())), rel=0.02)


@pytest.mark.slow
def test_step_that_the_loss_scaler_skips_is_not_recorded(make_config, model, batches, written):
    """A scale that overflows makes the first steps skip; the first one that runs is recorded."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, backoff_factor=2.0**-15)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)

    config = make_config(loggers=[_logger(log_freq=1, log="all")])
    Trainer(config, plugins=[precision]).fit(model, batches)

    (run,) = written()
    steps = list(_extremes(run, "gradients/layer.weight"))
    assert steps == list(_extremes(run, "parameters/layer.weight"))
    assert 0 < len(steps) < 4
