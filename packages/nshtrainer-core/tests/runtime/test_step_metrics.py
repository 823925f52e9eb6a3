from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.step_metrics import (
    NoDriverError,
    fetch,
    is_logging_step,
    log_step_metrics,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*:FutureWarning"
    ),  # Lightning 2.6 with torch 2.15
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # tiny data
]


class Recorder(Logger):
    """A logger in memory: one entry per call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name = "recorder"
    version = 0

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Module(LightningModule):
    """Logs through Lightning what the callback logs through us."""

    own_x = False

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("theirs", float(self.trainer.fit_loop.total_batch_idx))
        if self.own_x:
            self.log("step", 100.0 + self.trainer.fit_loop.total_batch_idx)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)

    def train_dataloader(self):
        return DataLoader(torch.arange(42.0).reshape(14, 3) / 42, batch_size=2)


class Ours(Callback):
    """Logs at each batch, from the given hook, the number of the batch."""

    def __init__(self, hook="on_train_batch_start", totals=()):
        self.hook, self.totals = hook, totals
        self.logging = []
        self.seen = []

    def setup(self, trainer, pl_module, stage):
        attach(trainer, "test")

    def write(self, trainer):
        number = trainer.fit_loop.total_batch_idx
        log_step_metrics(
            trainer,
            {
                "ours": torch.tensor(float(number)),
                "plain": number,
                "half": torch.tensor(0.5).half(),
            },
            totals=self.totals,
        )

    def on_train_batch_start(self, trainer, *args):
        if self.hook == "on_train_batch_start":
            self.write(trainer)

    def on_train_batch_end(self, trainer, *args):
        if is_logging_step(trainer):
            self.logging.append(trainer.fit_loop.total_batch_idx)
        if self.hook == "on_train_batch_end":
            self.write(trainer)


class Late(Ours):
    """The same, as a checkpoint callback: after the driver has sent the batch's metrics."""

    def __init__(self):
        super().__init__("on_train_batch_end")


class Reader(Callback):
    """Reads the trainer's metrics after each batch."""

    def __init__(self):
        self.callback, self.logged = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.callback.append(dict(trainer.callback_metrics))
        self.logged.append(dict(trainer.logged_metrics))


def make_trainer(logger, *callbacks, **options):
    options = {
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        **options,
    }
    return Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def rows(directory, column):
    with (directory / "metrics.csv").open() as file:
        return [
            (row["step"], row["epoch"], float(row[column]))
            for row in csv.DictReader(file)
            if row[column]
        ]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "log_every_n_steps": 1}])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_rows_have_the_x_and_epoch_of_lightnings_own(tmp_path, hook, options):
    """Beside self.log, our metrics appear at the same steps, epochs and batches in a CSV file."""
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer(logger, Ours(hook), **options).fit(Module())

    theirs = rows(tmp_path, "theirs")
    assert len(theirs) > 3
    assert rows(tmp_path, "ours") == theirs
    assert rows(tmp_path, "plain") == theirs


def test_a_step_that_the_module_logs_is_the_x_axis(tmp_path):
    """As Lightning's own metrics do, ours follow a module that logs the name `step`."""
    logger = CSVLogger(tmp_path, name="", version="")
    module = Module()
    module.own_x = True
    make_trainer(logger, Ours()).fit(module)

    assert [int(step) for step, _, _ in rows(tmp_path, "ours")] == [
        100 + int(value) for _, _, value in rows(tmp_path, "theirs")
    ]


def test_each_logger_is_called_once_per_logging_step():
    """However many times a callback logs, each logger gets one call with all names."""

    class Twice(Ours):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            log_step_metrics(trainer, {"more": 1.5})

    recorders = [Recorder(), Recorder()]
    callback = Twice()
    make_trainer(recorders, callback).fit(Module())

    for recorder in recorders:
        ours = [metrics for _, metrics in recorder.calls if "ours" in metrics]
        assert [metrics["ours"] for metrics in ours] == callback.logging
        assert all({"ours", "plain", "half", "more", "epoch"} == set(m) for m in ours)
        assert all(type(m["half"]) is float and m["half"] == 0.5 for m in ours)


class CountTransfers(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that bring a number to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_many_tensors_take_one_transfer(monkeypatch):
    """A hundred tensors of three dtypes reach the host through one tolist and no item()."""
    tensors = [torch.tensor(i, dtype=d) for i in range(40) for d in (torch.float32, torch.int64)]
    tensors += [torch.tensor(True), torch.tensor(0.25, dtype=torch.bfloat16)]
    lists = []
    original = torch.Tensor.tolist

    def tolist(self):
        lists.append(self.numel())
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with CountTransfers() as transfers:
        values = fetch(tensors)

    assert values == [float(i) for i in range(40) for _ in range(2)] + [1.0, 0.25]
    assert lists == [len(tensors)]
    assert transfers.count == 0


def test_totals_are_monitorable_without_any_logger():
    """Names in `totals` reach callback_metrics, all names logged_metrics, with logger=False."""
    reader = Reader()
    make_trainer(False, Ours(totals=["ours"]), reader).fit(Module())

    last = 13 - 13 % 2 - 1  # the last batch of fourteen that is a logging step, counted from zero
    assert reader.callback[-1]["ours"].item() in {last, 13.0}
    assert "plain" not in reader.callback[-1]
    assert {"ours", "plain", "half"} <= set(reader.logged[-1])


def test_metrics_logged_after_the_flush_are_sent_at_once():
    """A later callback's on_train_batch_end still lands on the same step."""
    from lightning.pytorch.callbacks import Checkpoint

    class LateCheckpoint(Late, Checkpoint):
        pass

    recorder, late = Recorder(), LateCheckpoint()
    make_trainer([recorder], late, enable_checkpointing=True).fit(Module())

    theirs = [(step, m["theirs"]) for step, m in recorder.calls if "theirs" in m]
    assert len(theirs) == 7
    assert [(step, m["ours"]) for step, m in recorder.calls if "ours" in m] == theirs


def test_every_batch_counts_in_fast_dev_run_and_none_with_interval_zero():
    """is_logging_step follows Lightning at both ends."""
    always, never = Ours(), Ours()
    make_trainer(False, always, fast_dev_run=3).fit(Module())
    make_trainer(False, never, log_every_n_steps=0).fit(Module())

    assert always.logging == [0, 1, 2]
    assert never.logging == []


def test_logging_without_a_driver_says_what_to_call():
    """The error names the function that a callback has to call in setup."""
    trainer = make_trainer(False)
    with pytest.raises(NoDriverError, match=r"driver\.attach\(trainer, owner\)"):
        log_step_metrics(trainer, {"a": 1.0})


def test_a_metric_is_one_number():
    """A tensor of several elements is refused with its name and shape."""

    class Wrong(Ours):
        def write(self, trainer):
            log_step_metrics(trainer, {"wide": torch.ones(2)})

    with pytest.raises(ValueError, match=r"'wide' has shape \(2,\).*Reduce it"):
        make_trainer(False, Wrong()).fit(Module())


@pytest.mark.parametrize("with_logger", [False, True])
def test_the_progress_bar_has_numbers_from_the_last_logging_step(with_logger):
    """A metric that asks for it stays in `progress_bar_metrics` until it is logged again; others never are."""

    class Showing(Callback):
        def setup(self, trainer, pl_module, stage):
            attach(trainer, "test")

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            count, norm = torch.tensor(batch_idx), torch.tensor(batch_idx / 4)
            metrics = {"count": count, "norm": norm, "plain": 0.5, "other": norm}
            log_step_metrics(trainer, metrics, prog_bar=["count", "norm", "plain"])

    class Seen(ModelCheckpoint):  # stands last
        def __init__(self):
            super().__init__(save_top_k=0)
            self.bars = []

        def on_train_batch_end(self, trainer, *args):
            self.bars.append(dict(trainer.progress_bar_metrics))

    seen = Seen()
    trainer = make_trainer(
        Recorder() if with_logger else False,
        Showing(),
        seen,
        max_epochs=1,
        enable_checkpointing=True,
    )

    trainer.fit(Module())

    at = [{"count": i, "norm": i / 4, "plain": 0.5} for i in (1, 1, 3, 3, 5, 5)]
    assert seen.bars == [{}, *at]
    assert {type(bar["count"]) for bar in seen.bars[1:]} == {int}
    assert {type(bar["norm"]) for bar in seen.bars[1:]} == {float}
