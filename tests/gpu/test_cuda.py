"""Every family on a real GPU: no waits of our own, exact averages, resumes and files.

Not part of what continuous integration runs, which has no GPU. On a machine with one:

    pytest tests/gpu
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from nshtrainer import Trainer, TrainerConfig
from nshtrainer_ema import EMACallback, GradientSkippingCallback
from nshtrainer_monitoring import FiniteChecksCallback, NormLoggingCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # of whatever releases that machine has

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
DECAY = 0.9


class Net(pl.LightningModule):
    """Layers with batch norm; the loss is *bad* at some batches."""

    def __init__(self, *, fused=False, bad=None, depth=3, width=32):
        super().__init__()
        torch.manual_seed(0)
        layers = [
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
            for _ in range(depth)
        ]
        self.net = nn.Sequential(*layers, nn.Linear(width, 4))
        self.fused, self.bad = fused, bad or {}

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss * self.bad.get(batch_idx, 1.0)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


def data(count=8, width=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count * 16, width, generator=generator).to(dtype)
    labels = torch.randint(4, (count * 16,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), 16)


def plain(tmp_path, *callbacks, **options):
    options = {"max_epochs": 1, "logger": CSVLogger(tmp_path), **options}
    return pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cuda",
        devices=1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class Weights(Callback):
    """Copies of the weights after each batch, and where averages are at the end of training."""

    def __init__(self):
        self.seen = []
        self.homes = set()

    def on_train_start(self, trainer, pl_module):
        self.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_end(self, trainer, pl_module):
        averages = [c.average for c in trainer.callbacks if isinstance(c, EMACallback)]
        self.homes = {t.device.type for average in averages for t in average.values()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- waiting for the device -------------------------------------------------------------------


class Waits(Callback):
    """Counts the host's waits for the device by batch, and where they come from."""

    def __init__(self):
        self.batch, self.counts, self.places = None, Counter(), Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch_idx

    def on_train_epoch_end(self, trainer, pl_module):
        self.batch = None

    def __enter__(self):
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._show
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*error)

    def _show(self, message, *args):
        if "synchronizing" in str(message) and self.batch is not None:
            self.counts[self.batch] += 1
            ours = [f for f in traceback.extract_stack() if "nshtrainer" in f.filename]
            self.places[f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "Lightning"] += 1


def every_callback(tmp_path, **options):
    return {
        "primary_metric": {"name": "val_loss", "mode": "min"},
        "checkpoint_saving": {
            "async_save": True,
            "checkpoint_callbacks": [
                {"name": "best_checkpoint"},
                {"name": "last_checkpoint", "save_on_time_interval": "PT30M"},
                {"name": "on_exception_checkpoint"},
            ],
        },
        "early_stopping": {"patience": 5},
        "lr_monitor": {"logging_interval": "step"},
        "log_epoch": {},
        "log_norms": dict.fromkeys(
            [f"log_{w}_norm{p}" for w in ("grad", "param", "update") for p in ("", "_per_param")],
            True,
        ),
        "auto_set_debug_flag": {},
        "auto_validate_metrics": {},
        "callbacks": [
            {"name": "ema", "decay": DECAY},
            {"name": "gradient_skipping", "threshold": 1e9, "start_after_n_steps": 0},
            {"name": "finite_checks"},
            {"name": "epoch_timer"},
            {"name": "print_table_metrics"},
        ],
        "loggers": [{"name": "csv"}],
        "directory": {"project_root": tmp_path},
        "accelerator": "cuda",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 10,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_callback_waits_for_the_device_off_the_logging_steps(tmp_path, precision, accumulate):
    """With all of them on, and a fused optimizer, as often as Lightning alone."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    settings = {"precision": precision, "accumulate_grad_batches": accumulate}
    loader = data(40, dtype=dtype)

    with Waits() as alone:
        trainer = plain(tmp_path / "a", alone, log_every_n_steps=10, **settings)
        trainer.fit(Net(fused=True), loader, data(1, dtype=dtype))
    config = TrainerConfig.model_validate(every_callback(tmp_path / "b", **settings))
    with Waits() as ours:
        Trainer(config, callbacks=[ours]).fit(Net(fused=True), loader, data(1, dtype=dtype))

    logging = range(10 * accumulate - 1, 40, 10 * accumulate)
    others = set(range(1, 39)) - set(logging)
    extra = {b: ours.counts[b] - alone.counts[b] for b in others if ours.counts[b]}
    assert all(n <= 0 for n in extra.values()), (extra, ours.places)


# ---- averages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_average_is_of_the_steps_that_were_applied(tmp_path, precision, fused):
    """Also where a GradScaler or a callback leaves steps out, and of bf16 weights in fp32."""
    bad = {2: math.inf, 5: 1e12}
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    weights, ema = Weights(), EMACallback(decay=DECAY)
    skipping = GradientSkippingCallback(threshold=1e6, start_after_n_steps=0, skip_non_finite=True)
    trainer = plain(tmp_path, weights, ema, skipping, precision=precision)

    trainer.fit(Net(fused=fused, bad=bad), data(dtype=dtype))

    first, *later = weights.seen
    expected = {name: value.float() for name, value in first.items()}
    before, applied = first, 0
    for now in later:
        if not same(before, now):
            applied += 1
            for name, value in now.items():
                expected[name].lerp_(value.float(), 1 - DECAY)
        before = now
    assert applied in (5, 6)  # a GradScaler's first scale may overflow by itself
    for name, value in expected.items():
        assert ema.average[name].dtype == torch.float32
        # After the run Lightning takes the module off the GPU, and the average goes with it.
        torch.testing.assert_close(ema.average[name].cpu(), value.cpu(), rtol=1e-5, atol=1e-7)
    assert weights.homes == {"cuda"}


def test_an_average_on_the_host_is_the_same(tmp_path):
    """`cpu_offload` moves what is averaged, and changes nothing of it."""
    averages = []
    for offload in (False, True):
        ema, weights = EMACallback(decay=DECAY, cpu_offload=offload), Weights()
        plain(tmp_path, weights, ema, precision="bf16-mixed").fit(Net(), data(), data(1))
        averages.append({n: t.cpu() for n, t in ema.average.items()})
        assert weights.homes == {"cpu" if offload else "cuda"}
    for name, value in averages[0].items():
        torch.testing.assert_close(averages[1][name], value, rtol=1e-5, atol=1e-7)


# ---- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, precision, async_save):
    """Weights, moments, scaler and average, bit for bit."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def run(folder, epochs, **fit):
        saving = {
            "async_save": async_save,
            "checkpoint_callbacks": [{"name": "last_checkpoint", "on_validation_end": True}],
        }
        options = {"checkpoint_saving": saving, "precision": precision, "max_epochs": epochs}
        config = TrainerConfig.model_validate(every_callback(folder, **options))
        module = Net(fused=True)
        trainer = Trainer(config)
        trainer.fit(module, data(dtype=dtype), data(1, dtype=dtype), **fit)
        (ema,) = [c for c in trainer.callbacks if isinstance(c, EMACallback)]
        return module, trainer, ema

    straight, _, average = run(tmp_path / "a", 4)
    _, stopped, _ = run(tmp_path / "b", 2)
    last = max(Path(tmp_path / "b").rglob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    resumed, _, other = run(tmp_path / "c", 4, ckpt_path=last)

    assert same(straight.state_dict(), resumed.state_dict())
    assert same(average.average, other.average)
    assert stopped.global_step == 16


def test_an_async_save_holds_the_weights_of_its_moment(tmp_path):
    """Training goes on while the file is written, and nothing of that gets into it."""
    saving = {
        "async_save": True,
        "checkpoint_callbacks": [{"name": "last_checkpoint", "every_n_steps": 3, "topk": 10}],
    }
    options = {"checkpoint_saving": saving, "callbacks": []}
    weights = Weights()
    config = TrainerConfig.model_validate(every_callback(tmp_path, **options))

    Trainer(config, callbacks=[weights]).fit(
        Net(width=256), data(12, width=256), data(1, width=256)
    )

    checked = 0
    for path in (p for p in tmp_path.rglob("*.ckpt") if not p.is_symlink()):
        content = torch.load(path, weights_only=True, map_location="cuda")
        expected = weights.seen[content["global_step"]]
        assert same(expected, content["state_dict"])
        checked += 1
    assert checked >= 4


# ---- seeing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logged_norms_are_those_of_the_unscaled_gradients(tmp_path, precision, fused):
    """At every precision, with and without a fused optimizer."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    seen = []

    class Reads(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler is not None and fused else 1.0
            grads = [p.grad.double() / scale for p in pl_module.parameters()]
            seen.append(torch.stack([g.norm() for g in grads]).norm().item())

    norms = NormLoggingCallback(log_grad_norm=True, log_grad_norm_per_param=True)
    trainer = plain(tmp_path, Reads(), norms, precision=precision, log_every_n_steps=1)
    logged = []
    trainer.logger.log_metrics = lambda metrics, step=None: logged.append(metrics)

    trainer.fit(Net(fused=fused), data(dtype=dtype))

    values = [m["train/grad_norm"] for m in logged if "train/grad_norm" in m]
    assert len(values) == len(seen) == 8
    for value, expected in zip(values, seen, strict=True):
        if math.isfinite(expected):
            assert value == pytest.approx(expected, rel=1e-4)
        else:
            assert not math.isfinite(value)


@pytest.mark.parametrize("fused", [False, True])
def test_finite_checks_skip_and_name_what_was_not_finite(tmp_path, caplog, fused):
    """Weights stay clean, by a flag on the device where the optimizer reads one."""
    weights = Weights()
    checks = FiniteChecksCallback(nonfinite_grads="skip", nonfinite_loss="skip")
    trainer = plain(tmp_path, weights, checks)

    trainer.fit(Net(fused=fused, bad={3: math.nan}), data())

    assert same(weights.seen[3], weights.seen[4])
    assert not same(weights.seen[4], weights.seen[5])
    assert all(t.isfinite().all() for t in weights.seen[-1].values())
    assert any("these steps were skipped" in r.message for r in caplog.records)


def test_runs_leave_no_memory_behind_on_the_device(tmp_path):
    """With everything on, run after run."""
    config = TrainerConfig.model_validate(every_callback(tmp_path, max_epochs=2))
    left = []
    for _ in range(3):
        Trainer(config).fit(Net(fused=True), data(), data(1))
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert left[2] <= left[1] + (1 << 20)
