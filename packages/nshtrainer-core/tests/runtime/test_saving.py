from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from nshtrainer.runtime.saving import PREPARED_KEY, install, is_installed, uninstall


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.arange(12.0).reshape(4, 3), batch_size=2)  # pyright: ignore[reportArgumentType] -- a tensor is a dataset


class Recorder(Callback):
    """Puts a second set of weights into each file and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[bool] = []

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
        weights_only: bool,
    ) -> None:
        self.calls.append(weights_only)
        checkpoint["second"] = {k: v + 1 for k, v in checkpoint["state_dict"].items()}


class Failing(Callback):
    def on_checkpoint_prepare(self, trainer: Any, module: Any, checkpoint: Any, weights_only: bool):
        checkpoint.pop("state_dict")
        raise ValueError("no averaged weights")


class Installer(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        install(trainer)
        install(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        uninstall(trainer)


def make_trainer(root: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fitted(root: Path, *callbacks: Callback) -> Trainer:
    trainer = make_trainer(root, *callbacks)
    trainer.fit(Module())
    return trainer


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


pytestmark = [
    # Lightning 2.6 on torch 2.15
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # a tiny loader needs no workers
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # the second trainer saves where the first one did
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
]


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_save_of_a_run_is_prepared_once(tmp_path: Path, weights_only: bool):
    """Full and weights-only files both hold what the callback adds, and load safely."""
    recorder = Recorder()
    checkpoint = ModelCheckpoint(
        tmp_path, save_weights_only=weights_only, save_top_k=-1, every_n_epochs=1
    )
    fitted(tmp_path, Installer(), recorder, checkpoint)
    files = sorted(tmp_path.glob("*.ckpt"))

    assert len(files) == 2
    assert recorder.calls == [weights_only] * 2
    for file in files:
        content = load(file)
        assert content[PREPARED_KEY] is True
        assert ("optimizer_states" in content) is not weights_only
        for name, value in content["state_dict"].items():
            assert torch.equal(content["second"][name], value + 1)


def test_a_prepared_file_resumes(tmp_path: Path):
    """Lightning resumes from such a file bit for bit."""
    checkpoint = {"dirpath": tmp_path, "filename": "{epoch}", "save_top_k": -1}
    straight = fitted(tmp_path, Installer(), Recorder(), ModelCheckpoint(**checkpoint))
    module = Module()
    resumed = make_trainer(tmp_path, Installer(), Recorder(), ModelCheckpoint(**checkpoint))
    resumed.fit(module, ckpt_path=tmp_path / "epoch=0.ckpt")

    assert resumed.global_step == straight.global_step == 4
    for name, value in straight.lightning_module.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_one_dict_saved_twice_is_prepared_once(tmp_path: Path):
    """The mark in the dict, and in a file that is loaded and saved again, is respected."""
    recorder = Recorder()
    trainer = fitted(tmp_path, recorder)
    install(trainer)
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)  # what a save writes
    trainer.strategy.save_checkpoint(content, tmp_path / "a.ckpt")
    trainer.strategy.save_checkpoint(content, tmp_path / "b.ckpt")
    trainer.strategy.save_checkpoint(load(tmp_path / "b.ckpt"), tmp_path / "c.ckpt")

    assert recorder.calls == [True]
    assert load(tmp_path / "c.ckpt").keys() == load(tmp_path / "a.ckpt").keys()


def test_a_failing_listener_stops_the_save_and_is_named(tmp_path: Path):
    """No half-prepared file is written, and the dict keeps its entries for another try."""
    trainer = fitted(tmp_path, Recorder(), Failing())
    install(trainer)
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # as above
    before = dict(content)
    with pytest.raises(ValueError, match="no averaged weights") as caught:
        trainer.strategy.save_checkpoint(content, tmp_path / "a.ckpt")
    if hasattr(caught.value, "__notes__"):  # Python 3.11
        assert any("Failing" in note for note in caught.value.__notes__)

    assert not (tmp_path / "a.ckpt").exists()
    assert content == before
    uninstall(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert PREPARED_KEY not in load(tmp_path / "a.ckpt")


def test_uninstall_restores_the_strategy_exactly(tmp_path: Path):
    """Installing and removing, also twice, leaves no trace on the strategy."""
    recorder = Recorder()
    trainer = fitted(tmp_path, recorder)
    before = dict(vars(trainer.strategy))
    install(trainer)
    assert is_installed(trainer)
    uninstall(trainer)
    uninstall(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    assert not is_installed(trainer)
    assert vars(trainer.strategy) == before
    assert recorder.calls == []


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_wrappers_of_others_stay_in_effect(tmp_path: Path, order: str):
    """Another wrapper, below or above, sees every save, before and after ours is removed."""
    recorder = Recorder()
    trainer = fitted(tmp_path, recorder)
    seen: list[str] = []

    def wrap() -> Any:
        inner = trainer.strategy.save_checkpoint

        def theirs(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            seen.append(Path(filepath).name)
            inner(checkpoint, filepath, storage_options=storage_options)

        trainer.strategy.save_checkpoint = theirs  # type: ignore[method-assign] -- what others do
        return theirs

    steps = [wrap, lambda: install(trainer)]
    for step in steps if order == "theirs first" else steps[::-1]:
        step()
    install(trainer)
    trainer.save_checkpoint(tmp_path / "a", weights_only=True)
    uninstall(trainer)
    trainer.save_checkpoint(tmp_path / "b", weights_only=True)
    install(trainer)
    trainer.save_checkpoint(tmp_path / "c", weights_only=True)
    uninstall(trainer)

    assert seen == ["a", "b", "c"]
    assert recorder.calls == [True, True]
    assert trainer.strategy.save_checkpoint.__name__ == "theirs"


def test_a_method_put_back_by_others_is_wrapped_again(tmp_path: Path):
    """If somebody restores the strategy's own method over ours, the next install is effective."""
    recorder = Recorder()
    trainer = fitted(tmp_path, recorder)
    install(trainer)
    del trainer.strategy.save_checkpoint  # type: ignore[attr-defined] -- removes the instance's one
    trainer.save_checkpoint(tmp_path / "a", weights_only=True)
    install(trainer)
    trainer.save_checkpoint(tmp_path / "b", weights_only=True)

    assert recorder.calls == [True]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_wrapped_strategy_can_be_copied_and_pickled(tmp_path: Path, duplicate: Any):
    """Spawning strategies pickle the strategy: the copy saves through itself, not the original."""
    trainer = make_trainer(tmp_path, Recorder())
    install(trainer)
    twin = duplicate(trainer)

    assert is_installed(twin)
    wrapper: Any = twin.strategy.save_checkpoint
    assert wrapper.strategy is twin.strategy
    assert wrapper.trainer is twin
    twin.fit(Module())
    twin.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert [c.calls for c in twin.callbacks if isinstance(c, Recorder)] == [[True]]
    assert "second" in load(tmp_path / "a.ckpt")
    uninstall(twin)
    assert "save_checkpoint" not in vars(twin.strategy)
