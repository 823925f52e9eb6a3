"""What the distributions promise together, on real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import nshtrainer
from nshtrainer import MetricConfig, Trainer, TrainerConfig, create_callbacks
from nshtrainer.testing import TinyDataModule, TinyModule, quiet_trainer_kwargs

pytestmark = pytest.mark.slow

EVERYTHING: list[dict[str, Any]] = [
    {"name": "ema", "decay": 0.9},
    {"name": "gradient_skipping", "threshold": 100.0, "start_after_n_steps": 0},
    {"name": "finite_checks"},
    {"name": "epoch_timer"},
    {"name": "print_table_metrics"},
]


def config(folder: Path, **fields: Any) -> TrainerConfig:
    return TrainerConfig(
        **{
            "directory": {"project_root": folder},
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "primary_metric": MetricConfig(name="val_loss", mode="min"),
            **fields,
        }
    )


def test_our_trainer_runs_with_every_family(tmp_path: Path):
    """Slots, defaults and the list together: metrics of all, checkpoints, a clean module afterwards."""
    module = TinyModule()
    trainer = Trainer(
        config(
            tmp_path,
            callbacks=EVERYTHING,
            early_stopping={"patience": 5},
            log_norms={"log_grad_norm": True, "log_param_norm": True},
            auto_validate_metrics={},
        )
    )
    trainer.fit(module, datamodule=TinyDataModule())
    checkpoints = trainer.config.run.directory.subdirectory("checkpoint")

    assert {"train/grad_norm", "train/param_norm", "val_loss"} <= set(trainer.callback_metrics)
    assert (checkpoints / "last.ckpt").resolve().is_file()
    assert (checkpoints / "best_val_loss.ckpt").resolve().is_file()
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


def test_a_plain_lightning_trainer_runs_with_callbacks_of_every_family(tmp_path: Path):
    """The second way in: `create_callbacks` for a trainer that is not ours."""
    callbacks = create_callbacks(
        [
            *EVERYTHING,
            "best_checkpoint",
            "last_checkpoint",
            {"name": "norm_logging", "log_grad_norm": True},
        ],
        primary_metric=MetricConfig(name="val_loss", mode="min"),
        directory={"project_root": tmp_path},
    )
    kwargs = quiet_trainer_kwargs(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    trainer = pl.Trainer(**kwargs)
    trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert trainer.global_step == 4
    assert list(tmp_path.rglob("last.ckpt"))
    assert "train/grad_norm" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:.*configured with multiple `ModelCheckpoint`")  # best and last
@pytest.mark.parametrize("which", ["last", "best"])
def test_the_words_last_and_best_find_our_checkpoints(tmp_path: Path, which: str):
    """As `ckpt_path` of fit and test, and of the config in a new process's trainer."""
    first = Trainer(config(tmp_path, id="one"))
    module = TinyModule()
    first.fit(module, datamodule=TinyDataModule())
    first.test(module, datamodule=TinyDataModule(), ckpt_path=which, verbose=False)
    first.test(datamodule=TinyDataModule(), ckpt_path=which, verbose=False)

    again = Trainer(config(tmp_path, id="one", max_epochs=3, ckpt_path="last"))
    again.fit(TinyModule(), datamodule=TinyDataModule())
    assert again.global_step == 12
    assert Trainer(config(tmp_path, ckpt_path="none")).config.ckpt_path is None


def test_a_first_run_that_asks_for_last_starts_from_scratch(tmp_path: Path):
    """The line that a requeued job needs: nothing there yet is no error."""
    trainer = Trainer(config(tmp_path, id="fresh", ckpt_path="last"))
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert trainer.global_step == 8


def test_a_config_in_slot_and_list_counts_once(tmp_path: Path):
    """The one in the list takes the slot's place; never 'more than one stateful callback'."""
    metric = MetricConfig(name="val_loss", mode="min")
    trainer = Trainer(
        config(
            tmp_path,
            early_stopping={"patience": 3},
            callbacks=[
                {"name": "debug_flag"},
                {"name": "log_epoch", "metric_name": "mine"},
                {"name": "learning_rate_monitor"},
                {"name": "early_stopping", "patience": 7, "metric": metric},
                {"name": "last_checkpoint", "topk": 2},
            ],
        )
    )
    kinds = [type(c).__name__ for c in trainer.callbacks]

    for kind in (
        "DebugFlagCallback",
        "LogEpochCallback",
        "EarlyStoppingCallback",
        "LastCheckpointCallback",
    ):
        assert kinds.count(kind) == 1, kinds
    assert trainer.early_stopping_callback.patience == 7
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    assert "mine" in trainer.callback_metrics


def test_the_learning_rate_monitor_goes_by_the_loggers_that_were_built(tmp_path: Path):
    """A disabled logger is none, and one that is given as an object counts."""
    off = Trainer(config(tmp_path, loggers=[{"name": "csv", "enabled": False}]))
    off.fit(TinyModule(), datamodule=TinyDataModule())
    given = Trainer(config(tmp_path, loggers=[]), logger=pl.loggers.CSVLogger(tmp_path / "mine"))
    given.fit(TinyModule(), datamodule=TinyDataModule())

    (written,) = (tmp_path / "mine").rglob("metrics.csv")
    assert "lr-AdamW" in written.read_text()


def test_the_debug_flag_is_restored_after_a_failing_sanity_check(tmp_path: Path):
    """On our Trainer and on a plain one."""

    class Fails(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("no")

    ours = Trainer(config(tmp_path, num_sanity_val_steps=1))
    plain = pl.Trainer(
        **quiet_trainer_kwargs(
            tmp_path, callbacks=create_callbacks(["debug_flag"]), num_sanity_val_steps=1
        )
    )
    for trainer in (ours, plain):
        with pytest.raises(RuntimeError, match=r"^no$"):
            trainer.fit(Fails(), datamodule=TinyDataModule())
        assert not getattr(trainer, "debug", False)


def test_a_checkpoint_that_is_saved_after_fit_is_like_one_saved_in_it(tmp_path: Path):
    """`trainer.save_checkpoint` at the end of a script has the averaged weights and the config too."""
    trainer = Trainer(config(tmp_path, callbacks=[{"name": "ema", "decay": 0.5}]))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    last = torch.load(
        trainer.config.run.directory.subdirectory("checkpoint") / "last.ckpt", weights_only=True
    )
    end = torch.load(tmp_path / "end.ckpt", weights_only=True)

    assert all(torch.equal(last["state_dict"][k], v) for k, v in end["state_dict"].items())
    assert end["trainer_hyper_parameters"]["id"] == trainer.config.run.id


def test_the_public_names_are_there():
    """`nshtrainer` gives what its `__all__` says."""
    assert all(getattr(nshtrainer, name) is not None for name in nshtrainer.__all__)
