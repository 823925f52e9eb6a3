"""What Lightning's documentation and tests promise of its `WeightAveraging`, of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from nshtrainer_ema import EarlyStoppingCallback, EMACallback

DECAY = 0.9
EPOCHS, BATCHES, ACCUMULATE = 4, 8, 2
STEPS = EPOCHS * BATCHES // ACCUMULATE


class CrashError(Exception):
    """Stands for whatever ends a run."""


class Net(pl.LightningModule):
    """Linear layers around BatchNorm; may fail at the start of an epoch."""

    def __init__(self, *, batch_norm: bool = True, crash_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(6)] if batch_norm else []
        self.layers = nn.Sequential(nn.Linear(4, 6), *norm, nn.ReLU(), nn.Linear(6, 1))
        self.crash_at = crash_at
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.crash_at is not None and self.current_epoch >= self.crash_at:
            raise CrashError
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.layers[-1].weight.detach().clone())
        self.log("val_loss", self._loss(batch))

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class LateNet(Net):
    """Makes its layers only in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))


class Stream(IterableDataset[Any]):
    """The same data, of which nobody knows how much there is."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return (self.data[i] for i in range(len(self.data)))


class FirstStep(pl.Callback):
    """Remembers the weights after the first optimizer step."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1 and not self.weights:
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def data(*, iterable: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, 4, generator=generator)
    dataset: Dataset[Any] = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(Stream(dataset) if iterable else dataset, batch_size=4)


def fit(
    model: Net, folder: Path, *callbacks: Any, iterable: bool = False, **options: Any
) -> pl.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        logger=False,
        callbacks=list(callbacks),
        max_epochs=options.pop("max_epochs", EPOCHS),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=ACCUMULATE,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, data(iterable=iterable), data(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("iterable", [True, False])
def test_the_average_is_lightnings(batch_norm, iterable, tmp_path):
    """One update for each optimizer step, the same numbers as `EMAWeightAveraging`."""
    ours, theirs = EMACallback(decay=DECAY), EMAWeightAveraging(decay=DECAY, use_buffers=False)
    first = FirstStep()
    start = dict(Net(batch_norm=batch_norm).named_parameters())
    fit(Net(batch_norm=batch_norm), tmp_path, ours, first, iterable=iterable)
    fit(Net(batch_norm=batch_norm), tmp_path, theirs, iterable=iterable)

    assert ours.ema.steps == {0: STEPS}
    assert theirs._average_model is not None
    for name, parameter in theirs._average_model.module.named_parameters():
        # Lightning's begins as the weights are after the first step, and ours before it.
        gap = DECAY**STEPS * (start[name] - first.weights[name])
        torch.testing.assert_close(ours.average[name], (parameter + gap).detach())


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_average_is_in_the_module_during_validation_and_after_the_fit(batch_norm, tmp_path):
    """`average_after_fit` is what Lightning always does."""
    model, ema = Net(batch_norm=batch_norm), EMACallback(decay=DECAY, average_after_fit=True)
    fit(model, tmp_path, ema)

    name = f"layers.{len(model.layers) - 1}.weight"
    assert torch.equal(model.validated[-1], ema.average[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ema.average[name])


def test_the_last_checkpoint_holds_the_weights_as_trained_all_the_same(tmp_path):
    """Lightning's holds the average twice, from which no run can go on."""
    model = Net()
    ema, saving = EMACallback(decay=DECAY, average_after_fit=True), ModelCheckpoint(tmp_path)
    fit(model, tmp_path, ema, saving)
    twin = Net()
    fit(twin, tmp_path, EMACallback(decay=DECAY))

    record = torch.load(saving.best_model_path, weights_only=True)["nshtrainer_average"]
    for name, parameter in twin.named_parameters():
        assert torch.equal(record["weights"][name], parameter)


def test_an_average_after_the_fit_gives_way_to_the_best_weights(tmp_path):
    """Early stopping that restores them has the last word."""
    model, ema = Net(), EMACallback(decay=DECAY, average_after_fit=True)
    stopping = EarlyStoppingCallback(
        metric={"name": "val_loss", "mode": "max"},  # falls, so that the first one stays the best
        patience=1,
        restore_best_weights=True,
    )
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    fit(model, tmp_path, ema, stopping, best, max_epochs=20)

    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert stopping.restored_path is not None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name])


def test_after_an_exception_the_module_holds_the_weights_as_trained(tmp_path):
    """Only a fit that ends as it should leaves the average."""
    model = Net(crash_at=2)
    ema = EMACallback(decay=DECAY, average_after_fit=True)
    with pytest.raises(CrashError):
        fit(model, tmp_path, ema)
    twin = Net()
    fit(twin, tmp_path, max_epochs=2)

    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_neither_module_nor_data_is_copied(tmp_path):
    """Lightning deep-copies the module, with all that hangs on it."""

    class Uncopyable(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the module was copied")

    fit(Uncopyable(), tmp_path, EMACallback(decay=DECAY))


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_run_that_crashed_and_resumed_ends_as_the_one_that_did_not(crash_at, tmp_path):
    """Bit for bit, with the average in the module in the end."""
    whole = Net()
    fit(whole, tmp_path / "whole", EMACallback(decay=DECAY, average_after_fit=True))
    crashing, saving = Net(crash_at=crash_at), ModelCheckpoint(tmp_path / "crashed")
    with pytest.raises(CrashError):
        fit(crashing, tmp_path, EMACallback(decay=DECAY, average_after_fit=True), saving)
    resumed = Net()
    ema = EMACallback(decay=DECAY, average_after_fit=True)
    fit(resumed, tmp_path, ema, ckpt_path=saving.best_model_path)

    assert ema.ema.steps == {0: STEPS}
    for left, right in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)


def test_layers_of_configure_model_are_averaged(tmp_path):
    """They are not there when the callback is set up, and are made once."""
    model, ema = LateNet(), EMACallback(decay=DECAY)
    fit(model, tmp_path, ema)

    assert set(ema.average) == {name for name, _ in model.named_parameters()}
    assert torch.equal(model.validated[-1], ema.average["layers.2.weight"])


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("start", [0, 10])
def test_updates_begin_at_a_step_and_come_at_an_interval(every, start, tmp_path):
    """Until then the average is the weights; between updates it rests."""

    class Recording(pl.Callback):
        def __init__(self, ema: EMACallback) -> None:
            self.ema = ema
            self.moved: list[int] = []
            self.before: dict[str, Tensor] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            now = copy.deepcopy(self.ema.average)
            if self.before and any(not torch.equal(now[n], self.before[n]) for n in now):
                self.moved.append(trainer.global_step)
            self.before = now

    ema = EMACallback(decay=DECAY, every_n_steps=every, start_step=start)
    recording = Recording(ema)
    fit(Net(), tmp_path, ema, recording)

    assert [s for s in recording.moved if s > 1] == [
        s for s in range(2, STEPS + 1) if s % every == 0
    ]


def test_a_checkpoint_without_an_average_starts_both_from_its_weights(tmp_path, caplog):
    """With a warning, as Lightning does."""
    saving = ModelCheckpoint(tmp_path)
    fit(Net(), tmp_path, saving, max_epochs=1)
    ema = EMACallback(decay=1.0)  # stays where it begins
    fit(Net(), tmp_path, ema, ckpt_path=saving.best_model_path, max_epochs=2)

    state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(ema.average[name], state[name]) for name in ema.average)
    assert "no average of the weights" in caplog.text


@pytest.mark.parametrize("name", ["state_dict", "load_from_checkpoint"])
def test_a_checkpoint_holds_the_average_for_whoever_loads_it(name, tmp_path):
    """The `state_dict` of a file is what validation measured."""
    ema, saving = EMACallback(decay=DECAY), ModelCheckpoint(tmp_path)
    fit(Net(), tmp_path, ema, saving)
    if name == "state_dict":
        state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    else:
        state = Net.load_from_checkpoint(saving.best_model_path).state_dict()

    for key, average in ema.average.items():
        assert torch.equal(state[key], average)
