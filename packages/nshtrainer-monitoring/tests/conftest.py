"""A tiny module, a logger that keeps what it is given, and a quiet trainer, for all tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, IterableDataset


class Net(LightningModule):
    """Two layers; logs what *logs* says: hook name to metric names."""

    def __init__(
        self,
        *,
        optimizers: int = 1,
        logs: dict[str, list[str]] | None = None,
        batches: int = 6,
        length_known: bool = True,
        configure: Callable[[Net], Any] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 1)
        self.automatic_optimization = optimizers == 1
        self.n_optimizers = optimizers
        self.logs = {"training_step": ["train/loss"], "validation_step": ["val/loss"]}
        self.logs = self.logs if logs is None else logs
        self.batches = batches
        self.length_known = length_known
        self.configure = configure

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(batch))).square().mean()

    def _step(self, batch: torch.Tensor, hook: str) -> torch.Tensor:
        loss = self.loss(batch)
        for name in self.logs.get(hook, []):
            self.log(name, loss, batch_size=2)
        return loss

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self._step(batch, "training_step")
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
            return None
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self._step(batch, "validation_step")

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self._step(batch, "test_step")

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        if self.n_optimizers == 1:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        layers = (self.first, self.second)
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]

    def _loader(self, n: int) -> Any:
        data = torch.sin(torch.arange(n * 2 * 3, dtype=torch.float32)).reshape(n * 2, 3)
        if not self.length_known:
            return DataLoader(Stream(data), batch_size=2)
        return DataLoader(data, batch_size=2)

    def train_dataloader(self) -> Any:
        return self._loader(self.batches)

    def val_dataloader(self) -> Any:
        return self._loader(2)

    def test_dataloader(self) -> Any:
        return self._loader(2)

    def predict_dataloader(self) -> Any:
        return self._loader(2)


class Stream(IterableDataset):
    """Data without a length."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)


class MemoryLogger(Logger):
    """Keeps every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, name: str) -> list[tuple[int | None, float]]:
        """Step and value of every time that *name* was logged."""
        return [(step, m[name]) for step, m in self.calls if name in m]


class SaveAt(Callback):
    """Saves a checkpoint after a number of steps; keeps no state, so no resume asks for it."""

    def __init__(self, step: int, path: Any) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def save_at() -> type[SaveAt]:
    return SaveAt


@pytest.fixture
def net() -> type[Net]:
    return Net


@pytest.fixture
def memory_logger() -> type[MemoryLogger]:
    return MemoryLogger


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Trainer]:
    """A plain Lightning trainer that prints and saves nothing unless it is asked to."""

    def make(*callbacks: Any, **options: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "max_epochs": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    noise = (
        "ignore:The '.*_dataloader' does not have many workers",  # two batches need none
        "ignore:.*LeafSpec.*is deprecated:FutureWarning",  # Lightning 2.6 with torch 2.15
        "ignore:Your `IterableDataset` has `__len__`",
    )
    for item in items:
        if "nshtrainer-monitoring" in str(item.path):
            for entry in noise:
                item.add_marker(pytest.mark.filterwarnings(entry))


@pytest.fixture(scope="session")
def run_on_two_ranks() -> Callable[..., tuple[list[Any], list[str]]]:
    """Runs the text of a script on two gloo ranks; gives what each wrote to `rank{i}.json`, and its output."""

    def run(script: str, folder: Path, mode: str) -> tuple[list[Any], list[str]]:
        path = folder / "train.py"
        path.write_text(script)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(path), str(folder), mode],
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
        results = [folder / f"rank{rank}.json" for rank in range(2)]
        assert all(result.exists() for result in results), "\n".join(outputs)
        return [json.loads(result.read_text()) for result in results], outputs

    return run
