from __future__ import annotations

import logging
import pickle

import pytest
import torch
from lightning.pytorch import Trainer as LightningTrainer

from nshtrainer import Trainer
from nshtrainer_wandb import WandbWatchCallback
from nshtrainer_wandb.watch.histogram import bin_counts

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
        config = make_config(loggers=[_logger(log_graph=True)], id=name)
        Trainer(config).fit(model, batches)

    first, second = written()
    assert _watched(first, "gradients") == _watched(second, "gradients") == NAMES
    assert "graph_0" in {key.split("/")[0] for key in first.summary}


@pytest.mark.slow
def test_nothing_stays_on_the_module_after_an_exception(make_config, failing_model, batches):
    """Hooks and marks are gone, and the module can be pickled."""
    config = make_config(loggers=[_logger(log="all", log_graph=True)])

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


def test_bins_hold_every_finite_entry():
    """Counts sum up to the finite entries, edges span them; equal entries are one bin."""
    counted = bin_counts(torch.tensor([0.0, 1.0, 2.0, float("nan"), float("inf")]), bins=2)
    assert counted is not None
    assert [part.tolist() for part in counted] == [[1.0, 2.0], [0.0, 1.0, 2.0]]

    single = bin_counts(torch.full((3,), 5.0, dtype=torch.bfloat16))
    assert single is not None
    assert [part.tolist() for part in single] == [[3.0], [5.0, 5.0]]
    assert bin_counts(torch.tensor([float("nan")])) is None
