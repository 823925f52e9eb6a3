"""With every callback of every family, the host waits for the device at logging steps only."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.callbacks import Callback, Checkpoint

import nshtrainer
from nshtrainer import TrainerConfig
from nshtrainer.runtime.step_metrics import is_logging_step
from nshtrainer.testing import HostSyncs, TinyDataModule, TinyModule

if TYPE_CHECKING:
    from benchmarks import every_family
else:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        every_family = importlib.import_module("benchmarks.every_family")
    finally:
        sys.path.pop(0)

pytestmark = pytest.mark.slow

BATCHES = 12
PER_PARAMETER = {
    f"log_{kind}_norm{part}": True
    for kind in ("grad", "param", "update", "moment")
    for part in ("", "_per_param", "_per_module")
}
SKIPPING = {
    "name": "gradient_skipping",
    "threshold": 100.0,
    "policy": "zscore",
    "warmup_steps": 2,
    "start_after_n_steps": 0,
    "skip_non_finite": True,
    "max_consecutive": 5,
}


class Module(TinyModule):
    """With a parameter that is used several times, as `shared_parameters` expects."""

    @property
    def shared_parameters(self) -> list[tuple[Any, int]]:
        return [(self.head.weight, 2)]


class Begin(Callback):
    """Stands first; sorts what follows by whether the step is logged. The first step sets up."""

    def __init__(self, syncs: HostSyncs) -> None:
        self.syncs = syncs

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        self.syncs.section = (is_logging_step(trainer), batch) if batch else None


class End(Checkpoint):
    """Stands last."""

    def __init__(self, syncs: HostSyncs) -> None:
        self.syncs = syncs

    def on_train_batch_end(self, *args: Any) -> None:
        self.syncs.section = None


def syncs_of(folder: Path, *, everything: bool, module: dict[str, Any], **options: Any) -> Any:
    """What is counted in a run of two epochs: (is logged, batch) -> operation -> how often."""
    run = {**every_family.every_family(), "loggers": [{"name": "csv"}]}
    run["log_norms"] = PER_PARAMETER
    run["callbacks"] = [
        SKIPPING if callback["name"] == "gradient_skipping" else callback
        for callback in run["callbacks"]
    ]
    if not everything:
        off = ("checkpoint_saving", "early_stopping", "lr_monitor", "log_epoch", "log_norms")
        off += ("shared_parameters", "auto_set_debug_flag", "auto_validate_metrics")
        run |= dict.fromkeys(off) | {"callbacks": []}
    config = TrainerConfig.model_validate(
        {
            **run,
            "directory": {"project_root": folder},
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 4,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer, syncs = nshtrainer.Trainer(config), HostSyncs()
    trainer.callbacks = [Begin(syncs), *trainer.callbacks, End(syncs)]
    if everything:
        state_keys = {callback.state_key for callback in trainer.callbacks}
        assert {"nshtrainer.norm_logging", "nshtrainer.gradient_skipping"} <= state_keys
    with syncs:
        trainer.fit(Module(fused=True, **module), TinyDataModule(batches=BATCHES))
    assert trainer.state.finished
    return syncs.counts


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "automatic": ({}, {}),
    "clipped": ({}, {"gradient_clip_val": 0.5}),
    "accumulating": ({}, {"accumulate_grad_batches": 2}),
    "manual": ({"manual": True}, {}),
    "manual, two optimizers": ({"optimizers": 2}, {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_callback_together_adds_none_between_logging_steps(mode, tmp_path):
    """Skipping by the device (a fused optimizer), every norm of every parameter, all others on."""
    module, options = MODES[mode]

    without = syncs_of(tmp_path / "without", everything=False, module=module, **options)
    found = syncs_of(tmp_path / "with", everything=True, module=module, **options)

    added = {step: counts - without.get(step, Counter()) for step, counts in found.items()}
    bad = {step: counts for (is_logged, step), counts in added.items() if counts and not is_logged}
    assert not bad
    # The counting works: at a logging step the values have to reach the host.
    assert any(counts for (is_logged, _), counts in added.items() if is_logged)
