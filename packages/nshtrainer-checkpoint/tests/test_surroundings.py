from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from nshtrainer import MetricConfig, create_callbacks
from nshtrainer_checkpoint import BestCheckpointCallback, LastCheckpointCallback
from nshtrainer_checkpoint.metadata import SidecarReader, is_intact

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]

MIN = {"name": "val/loss", "mode": "min"}


def best(**options: Any) -> dict[str, Any]:
    return {"name": "best_checkpoint", "metric": MIN, **options}


def last(**options: Any) -> dict[str, Any]:
    return {"name": "last_checkpoint", **options}


def only(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint_saving": {"checkpoint_callbacks": list(configs)}}


def values_in(folder: Path) -> list[float | None]:
    return sorted(r.value for r in SidecarReader().records(folder))


class _Listener(Callback):
    def __init__(self) -> None:
        self.saved: list[tuple[str, int]] = []
        self.removed: list[str] = []
        self.complete = True

    def on_checkpoint_saved(self, trainer, pl_module, path: Path, metadata) -> None:
        self.saved.append((path.parent.name, metadata["global_step"]))
        self.complete &= path.exists() and Path(f"{path}.metadata.json").exists()

    def on_checkpoint_removed(self, trainer, pl_module, path: Path) -> None:
        self.removed.append(path.name)
        self.complete &= not path.exists()


def test_others_hear_of_saved_and_removed_checkpoints(fit, model):
    """The events come after the fact, with path and metadata."""
    listener = _Listener()
    fit(model([0.2, 0.1]), objects={"callbacks": [listener]}, **only(best(), last()))

    assert listener.saved == [(f, s) for s in (4, 8) for f in ("last", "best_val_loss")]
    assert [n.split("-")[1] for n in listener.removed] == ["step4", "step4"]
    assert listener.complete


class _Log(Logger):
    name, version, experiment = "log", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, float | None]] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        call = checkpoint_callback
        assert is_intact(SidecarReader().records(Path(call.dirpath))[0])
        score = None if call.best_model_score is None else float(call.best_model_score)
        self.seen.append((Path(call.dirpath).name, Path(call.last_model_path).name, score))


def test_loggers_are_told_as_by_lightning(fit, model):
    """`after_save_checkpoint` comes after the commit, with Lightning's attributes set."""
    logger = _Log()
    fit(model([0.5]), max_epochs=1, objects={"logger": logger}, **only(best()))

    assert logger.seen == [("best_val_loss", "epoch0-step4-val_loss0.5.ckpt", 0.5)]


def test_a_plain_lightning_trainer_has_it_all(plain_fit, model, loader, tmp_path: Path):
    """Callbacks made by hand save below the root directory, test the best and resume the last."""

    def callbacks() -> list[pl.Callback]:
        return [BestCheckpointCallback(metric=MetricConfig(**MIN)), LastCheckpointCallback()]

    module = model([0.1, 0.2])
    trainer = plain_fit(module, callbacks())
    trainer.test(dataloaders=loader(), ckpt_path="best", verbose=False)
    assert "epoch0-step4" in trainer.ckpt_path
    assert (tmp_path / "checkpoint" / "last.ckpt").exists()

    trainer = plain_fit(model([0.3, 0.3]), callbacks(), ckpt_path="last", max_epochs=4)
    assert trainer.global_step == 16
    assert values_in(tmp_path / "checkpoint" / "best_val_loss") == pytest.approx([0.1])


def test_created_callbacks_serve_a_plain_trainer(plain_fit, model, tmp_path: Path):
    """`create_callbacks` gives a run with an id and its directory."""
    callbacks = create_callbacks(
        ["checkpoint_saving"],
        id="r",
        primary_metric=MetricConfig(**MIN),
        directory={"project_root": tmp_path},
    )
    plain_fit(model(), callbacks)

    folder = tmp_path / "nshtrainer_logs" / "r" / "checkpoint"
    assert (folder / "best_val_loss.ckpt").exists()
    assert (tmp_path / "nshtrainer_logs" / ".gitignore").exists()


class _Sharded(pl.strategies.SingleDeviceStrategy):
    """Saves a directory, as sharding strategies do."""

    def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
        Path(filepath).mkdir(parents=True)
        torch.save(checkpoint, Path(filepath) / "shard0.pt")


def test_a_checkpoint_may_be_a_directory(fit, model, folder: Path, names):
    """Strategies that save a directory are committed, linked and pruned alike."""
    fields = dict.fromkeys(("accelerator", "devices"))
    strategy = _Sharded(device=torch.device("cpu"), accelerator=pl.accelerators.CPUAccelerator())
    fit(model(), objects={"strategy": strategy}, **fields, **only(last()))

    assert len(names(folder / "last")) == 1
    assert (folder / "last.ckpt" / "shard0.pt").exists()
    assert len([p for p in (folder / "last").iterdir() if p.is_dir()]) == 1


def test_asynchronous_checkpoint_io_works(fit, model, folder: Path):
    """A plugin that writes in a thread is waited for before the commit."""
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    fit(model(), objects={"plugins": [AsyncCheckpointIO()]}, **only(last()))

    assert is_intact(SidecarReader().records(folder / "last")[0])


def test_nothing_goes_through_the_systems_temporary_folder(
    fit, model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may be small, or on another disk; the digest taken while writing is that of the file."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "does" / "not" / "exist"))
    trainer = fit(model(), **only(last()))

    assert is_intact(SidecarReader().records(folder / "last")[0])
    assert "Streaming" not in type(trainer.strategy.checkpoint_io).__name__


class _FullDisk(Callback):
    """Lets the second save fail as a full disk would."""

    def __init__(self) -> None:
        self.saves = 0

    def on_checkpoint_prepare(self, trainer, pl_module, checkpoint, weights_only) -> None:
        self.saves += 1
        if self.saves == 2:
            raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_older_one(fit, model, folder: Path):
    """The error reaches the user; file, metadata and link of before are whole, nothing is torn."""
    with pytest.raises(OSError, match="No space left"):
        fit(model(), objects={"callbacks": [_FullDisk()]}, **only(last()))

    (record,) = SidecarReader().records(folder / "last")
    assert record.step == 4
    assert is_intact(record)
    assert (folder / "last.ckpt").resolve() == record.path
    assert len(os.listdir(folder / "last")) == 2


def test_an_unreadable_value_in_a_checkpoint_is_named(fit, model, caplog: pytest.LogCaptureFixture):
    """A user's key that torch would refuse to read is told once, with place and class."""

    class Odd(model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"path": Path("x")}

    fit(Odd(), **only(last()))

    assert caplog.text.count("checkpoint['mine']['path']") == 1


def test_callbacks_can_be_copied_and_pickled(model):
    """Spawning strategies pickle them; a copy names the same folder."""
    import copy
    import pickle

    callback = LastCheckpointCallback(dirpath=Path("x"))
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.state_key == callback.state_key
        assert other.writer.locate() == callback.writer.locate()
