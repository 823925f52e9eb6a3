"""Checkpoints of nshtrainer-checkpoint as W&B artifacts, and the W&B run in their metadata."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.testing import TinyLoader, TinyModule

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,  # a W&B run takes half a second to open
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning with new torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def _reader() -> ModuleType:
    """The package's reader of `.wandb` files."""
    path = ROOT / "packages" / "nshtrainer-wandb" / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("wandb_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, and a W&B that stays within it."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    for name, value in {"SILENT": "true", "X_DISABLE_STATS": "true", "MODE": "offline"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _config(**fields: Any) -> TrainerConfig:
    quiet: dict[str, Any] = {
        "id": "r1", "accelerator": "cpu", "devices": 1, "max_epochs": 3, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "primary_metric": {"name": "val/loss", "mode": "min"},
        "loggers": [{"name": "wandb", "watch": None, "log_code": None, "log_model": "latest"}],
    }  # fmt: skip
    return TrainerConfig.model_validate({**quiet, **fields})


def _runs(folder: Path) -> list[Any]:
    import wandb

    wandb.teardown()  # waits until everything is in the files
    files = sorted(folder.rglob("*.wandb"), key=lambda p: p.stat().st_ctime_ns)
    return [_reader().read_wandb_file(file) for file in files]


class Scripted(TinyModule):
    """Its validation loss gets worse after the first epoch; may fail in the last one."""

    fails = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(float(self.current_epoch + 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails and self.current_epoch == 2 and batch_idx == 1:
            raise RuntimeError("the model failed")
        return super().training_step(batch, batch_idx)


def _metadata(folder: Path) -> dict[str, dict[str, Any]]:
    found = (json.loads(p.read_text()) for p in folder.rglob("*.ckpt.metadata.json"))
    return {data["checkpoint_filename"]: data for data in found}


def test_what_is_kept_goes_up_with_its_aliases(folder: Path):
    """Best and last of three epochs are two versions; what `topk` deleted is none."""
    Trainer(_config()).fit(Scripted(), TinyLoader(4), TinyLoader(2))

    (run,) = _runs(folder)
    versions = [v for v in run.versions if v.type == "model"]
    files = _metadata(folder)
    assert [v.aliases for v in versions] == [["best", "latest"], ["latest"]]
    assert {v.metadata["original_filename"] for v in versions} == set(files)
    for version in versions:
        saved = files[version.metadata["original_filename"]]
        assert version.metadata["checkpoint_checksum"] == saved["checkpoint_checksum"]
        assert version.metadata["global_step"] == saved["global_step"]


def test_metadata_of_a_checkpoint_name_the_wandb_run(folder: Path):
    """What is beside a checkpoint says which W&B run it is of, and where."""
    Trainer(_config(max_epochs=1)).fit(Scripted(), TinyLoader(1), TinyLoader(1))

    (run,) = _runs(folder)
    (known,) = {json.dumps(data["loggers"]["wandb"]) for data in _metadata(folder).values()}
    assert json.loads(known) == {
        "id": run.id, "project": run.project, "entity": None, "url": None, "is_offline": True,
    }  # fmt: skip


def test_checkpoint_of_the_exception_goes_up_before_the_run_is_finished(folder: Path):
    """A run that fails uploads what it has kept, and last what is saved because it fails."""
    model = Scripted()
    model.fails = True

    with pytest.raises(RuntimeError, match="the model failed"):
        Trainer(_config()).fit(model, TinyLoader(2), TinyLoader(1))

    (run,) = _runs(folder)
    versions = [v for v in run.versions if v.type == "model"]
    assert run.exit_code == 1
    assert versions[0].aliases == ["best", "latest"]
    assert versions[-1].metadata["callback"] == "on_exception_checkpoint"
    assert versions[-1].metadata["global_step"] == 5


def test_uploaded_content_outlives_its_checkpoint(folder: Path):
    """`wandb sync` finds what was logged although the checkpoints have been deleted since."""
    Trainer(_config(max_epochs=1)).fit(Scripted(), TinyLoader(1), TinyLoader(1))
    for path in folder.rglob("*.ckpt"):
        path.unlink()

    (run,) = _runs(folder)
    (version,) = (v for v in run.versions if v.type == "model")
    held = torch.load(version.files["model.ckpt"], weights_only=True)
    assert held["global_step"] == 1


def test_checkpoint_in_a_store_is_referred_to(folder: Path):
    """One that lies in an object store is not copied: the artifact has its address."""
    saving = {"name": "checkpoint_saving", "checkpoint_callbacks": [
        {"name": "last_checkpoint", "dirpath": "memory://artifacts/c"}
    ]}  # fmt: skip

    config = _config(max_epochs=1, checkpoint_saving=saving)
    Trainer(config).fit(Scripted(), TinyLoader(1), TinyLoader(1))

    (run,) = _runs(folder)
    (version,) = (v for v in run.versions if v.type == "model")
    assert version.files["model.ckpt"].startswith("memory://artifacts/c/last/epoch0-step1")
