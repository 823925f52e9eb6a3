"""Real wandb, offline; what it wrote is read back from its files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from nshtrainer import TrainerConfig

_BLOCK = 32768
_FILE_HEADER = 7
_CHUNK_HEADER = 7


@dataclass
class Version:
    """One logged artifact."""

    name: str
    type: str
    aliases: list[str]
    metadata: dict[str, Any]
    files: dict[str, str]
    """Path within the artifact -> where W&B reads it."""


@dataclass
class WrittenRun:
    """What one `.wandb` file says."""

    id: str = ""
    project: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    """Type -> paths of the files in all artifacts of this type."""
    versions: list[Version] = field(default_factory=list["Version"])
    """All artifacts, in the order in which they were logged."""
    exit_code: int | None = None
    """None if the run was not finished."""


def _payloads(content: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file, which has the layout of a LevelDB log behind 7 bytes."""
    position, parts = _FILE_HEADER, b""
    while position + _CHUNK_HEADER <= len(content):
        if _BLOCK - position % _BLOCK < _CHUNK_HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        start = position + _CHUNK_HEADER
        parts += content[start : start + length]
        position = start + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _items(items: Any) -> dict[str, Any]:
    return {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json or "null")
        for item in items
    }


def read_wandb_file(path: Path) -> WrittenRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = WrittenRun()
    for payload in _payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project = record.run.run_id, record.run.project
            run.name, run.notes = record.run.display_name, record.run.notes
            run.tags = list(record.run.tags)
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "artifact":
            artifact = record.artifact
            run.versions.append(
                Version(
                    artifact.name,
                    artifact.type,
                    sorted(artifact.aliases),
                    json.loads(artifact.metadata or "{}"),
                    {e.path: e.local_path or e.ref for e in artifact.manifest.contents},
                )
            )
            run.artifacts.setdefault(record.artifact.type, []).extend(
                entry.path for entry in record.artifact.manifest.contents
            )
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


@pytest.fixture(scope="session", autouse=True)
def wandb_offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, no account, no files outside pytest's folder; W&B reads these variables once."""
    home = tmp_path_factory.mktemp("wandb-home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        patch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")  # reads the metadata of every package
        patch.setenv("NETRC", str(home / "netrc"))
        yield


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder, which is the current one; no run is open before a test."""
    root = tmp_path / "my-project"
    root.mkdir()
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def written(project: Path) -> Callable[[], list[WrittenRun]]:
    """Read every W&B run below the project, oldest first."""

    def read() -> list[WrittenRun]:
        import wandb

        wandb.teardown()  # waits until everything is in the files, which `finish` does not
        files = sorted(project.rglob("*.wandb"), key=lambda p: p.stat().st_ctime_ns)
        return [read_wandb_file(file) for file in files]

    return read


class TinyModel(LightningModule):
    """One linear layer; logs its loss."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.fail_at = fail_at

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("the model failed")
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("test/loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ValidatedModel(TinyModel):
    """The same, for trainings with validation; Lightning warns of a step without data."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch))


@pytest.fixture
def validated_model() -> ValidatedModel:
    torch.manual_seed(0)
    return ValidatedModel()


@pytest.fixture
def model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel()


@pytest.fixture
def failing_model() -> TinyModel:
    return TinyModel(fail_at=2)


class Batches:
    """Four fixed batches; no DataLoader, whose missing workers Lightning would warn of."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((2, 4), float(i + 1)) for i in range(4))

    def __len__(self) -> int:
        return 4


@pytest.fixture
def batches() -> Batches:
    return Batches()


@pytest.fixture
def make_config() -> Callable[..., TrainerConfig]:
    """A quiet configuration for one epoch on the CPU, with nothing but what is asked for."""

    def make(**fields: Any) -> TrainerConfig:
        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "checkpoint_saving": None,
            "lr_monitor": None,
            "log_epoch": None,
            "auto_set_debug_flag": None,
            "loggers": [],
        }
        return TrainerConfig.model_validate({**quiet, **fields})

    return make


@pytest.fixture
def run_script(project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of two ranks in the project's folder, and expects it to end well."""

    def run(script: str, *launcher: str) -> subprocess.CompletedProcess[str]:
        (project / "train.py").write_text(script)
        done = subprocess.run(
            [sys.executable, *launcher, "train.py"],
            cwd=project,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run
