from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint import LastCheckpointCallback
from nshtrainer_checkpoint.metadata import SidecarReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
]


def last(**options: Any) -> dict[str, Any]:
    return {"checkpoint_saving": {"checkpoint_callbacks": [{"name": "last_checkpoint", **options}]}}


def newest(folder: Path) -> Path:
    return max(SidecarReader().records(folder / "last"), key=lambda r: r.order).path


def flip(path: Path) -> None:
    """Change one bit in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_auto_starts_from_scratch_and_then_goes_on(fit, model, caplog):
    """The same line starts a run and continues it, as a requeued job needs; no warning the first time."""
    with caplog.at_level(logging.INFO, logger="nshtrainer_checkpoint"):
        first = fit(model(), ckpt_path="auto", max_epochs=1, **last())
        second = fit(model(), ckpt_path="auto", max_epochs=3, **last())
        straight = fit(model(), id="straight", max_epochs=3, **last())

    assert (first.global_step, second.global_step) == (4, 12)
    assert first.ckpt_path is None
    assert Path(second.ckpt_path).name.startswith("epoch0-step4")
    for a, b in zip(
        second.lightning_module.parameters(), straight.lightning_module.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert "starts from scratch" in caplog.text
    assert "resuming from" in caplog.text


def test_auto_in_the_config_counts_for_a_first_fit(fit, model):
    """`ckpt_path: auto` in a file is all that a requeued job needs."""
    fit(model(), max_epochs=1, **last())
    trainer = fit(model(), max_epochs=2, **{"ckpt_path": "auto", **last()})

    assert trainer.global_step == 8
    assert trainer.ckpt_path is not None


def test_auto_takes_the_one_before_a_damaged_one_and_says_so(fit, model, folder: Path, caplog):
    """A flipped bit costs the steps since the checkpoint before, not the run."""
    fit(model(), max_epochs=3, **last(topk=2))
    damaged = newest(folder)
    flip(damaged)

    trainer = fit(model(), ckpt_path="auto", max_epochs=4, **last(topk=2))

    assert "step8" in str(trainer.ckpt_path)
    assert f"{damaged} is damaged" in caplog.text


def test_auto_without_a_good_one_starts_from_scratch_and_keeps_the_damaged_one(
    fit, model, folder: Path, caplog
):
    """Nothing is deleted that a person could still look into."""
    fit(model(), max_epochs=1, **last())
    damaged = newest(folder)
    flip(damaged)

    trainer = fit(model(), ckpt_path="auto", max_epochs=2, **last())

    assert trainer.ckpt_path is None
    assert trainer.global_step == 8
    assert damaged.exists()
    assert "is damaged" in caplog.text


def test_auto_passes_over_weights_only_files_and_other_runs(fit, model):
    """Neither can be resumed from."""
    fit(model(), id="other", max_epochs=2, **last())
    fit(model(), max_epochs=1, **last(save_weights_only=True))
    trainer = fit(model(), ckpt_path="auto", max_epochs=1, **last())

    assert trainer.ckpt_path is None


def test_auto_works_on_a_plain_trainer(plain_fit, model):
    """There it means the checkpoints below the trainer's root directory."""
    first = plain_fit(model(), [LastCheckpointCallback()], ckpt_path="auto", max_epochs=1)
    second = plain_fit(model(), [LastCheckpointCallback()], ckpt_path="auto", max_epochs=3)

    assert first.ckpt_path is None
    assert second.global_step == 12
    assert "step4" in str(second.ckpt_path)


def test_auto_needs_checkpoints(tmp_path: Path, model, loader):
    """Without a callback that saves, the word would silently mean nothing."""
    trainer = Trainer(TrainerConfig(checkpoint_saving=None, loggers=[]))
    with pytest.raises(ConfigError, match="saves any that it could find"):
        trainer.fit(model(), loader(), ckpt_path="auto")


def test_auto_is_left_out_of_a_fast_dev_run(fit, model):
    """It saves nothing and resumes nothing."""
    assert fit(model(), ckpt_path="auto", fast_dev_run=True).global_step == 1


def test_auto_with_a_new_id_is_warned_of(tmp_path: Path, fit, model, caplog):
    """Each start would be another run, and the checkpoints of none would be found."""
    fit(model(), id=None, ckpt_path="auto", max_epochs=1, **last())

    assert "this run gets a new id" in caplog.text


def test_auto_is_refused_where_a_checkpoint_is_evaluated(fit, model, loader):
    """What is measured must be said: the best, the last, or a path."""
    trainer = fit(model(), max_epochs=1, **last())
    with pytest.raises(ConfigError, match="'best', 'last' or a path"):
        trainer.validate(model(), loader(), ckpt_path="auto", verbose=False)


def test_a_user_wrapper_of_the_connector_survives(fit, model, tmp_path: Path, loader):
    """What others put around the same method is called, and stays."""
    fit(model(), max_epochs=1, **last())
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", devices=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[LastCheckpointCallback()],
    )  # fmt: skip
    connector: Any = trainer._checkpoint_connector
    seen: list[Any] = []
    original = connector.resume_start

    def wrapper(path: Any = None, *args: Any, **kwargs: Any) -> None:
        seen.append(path)
        original(path, *args, **kwargs)

    connector.resume_start = wrapper
    trainer.fit(model(), loader(), loader(), ckpt_path="auto")

    assert seen == [None]
    assert connector.resume_start is wrapper


class _Breaks(pl.Callback):
    """Makes one weight NaN at the start of an epoch, and the buffers infinite always."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            with torch.no_grad():
                pl_module.layer.weight[0, 1] = float("nan")


@pytest.mark.parametrize("word", ["auto", "last"])
def test_weights_that_are_nan_are_passed_over(fit, model, caplog, word: str):
    """Said when they are saved, and a resumed run takes the checkpoint before."""
    module = model([0.3, 0.2, 0.1])
    fit(module, max_epochs=3, objects={"callbacks": [_Breaks(2)]}, **last(topk=2))
    assert "step 12" in caplog.text
    assert "hold NaN or infinity" in caplog.text

    trainer = fit(model(), ckpt_path=word, max_epochs=3, **last(topk=2))

    assert "step8" in str(trainer.ckpt_path)
    assert "weights that are NaN or infinite" in caplog.text


def test_weights_that_are_nan_are_warned_of_when_their_path_is_given(
    fit, model, folder: Path, caplog
):
    """Who names a file gets it, and hears which one is better."""
    fit(model([0.3, 0.2]), max_epochs=2, objects={"callbacks": [_Breaks(1)]}, **last(topk=2))
    caplog.clear()
    trainer = fit(model(), ckpt_path=newest(folder), max_epochs=2, **last(topk=2))

    assert trainer.global_step == 8
    assert "step4" in caplog.text


def test_infinite_buffers_and_large_weights_are_no_fault(fit, model, folder: Path, caplog):
    """A mask of -inf is ordinary, and a sum that overflows does not make its terms infinite."""
    module = model()
    module.register_buffer("mask", torch.full((3,), -torch.inf))
    module.extra = torch.nn.Parameter(torch.full((4,), 3e38))
    fit(module, max_epochs=1, **last())

    assert "NaN or infinity" not in caplog.text
    assert newest(folder)
    assert all(r.weights_finite for r in SidecarReader().records(folder / "last"))
