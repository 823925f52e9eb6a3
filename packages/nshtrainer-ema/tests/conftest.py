"""Small models, and a trainer that is quiet: real training, in milliseconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(LightningModule):
    """Two layers on fixed data; `probe` records what evaluation sees."""

    def __init__(
        self,
        optimizer: Callable[..., Any] = torch.optim.AdamW,
        lr: float = 0.1,
        batch_losses: dict[int, float] | None = None,
        **optimizer_options: Any,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.make_optimizer, self.lr, self.options = optimizer, lr, optimizer_options
        self.batch_losses = batch_losses or {}
        self.probe: list[Tensor] = []
        self.trained: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x).float(), y.float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch) * self.batch_losses.get(self.global_step, 1.0)
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append([p.detach().clone() for p in self.parameters()])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.probe.append(self.second.weight.detach().clone())
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.probe.append(self.second.weight.detach().clone())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.probe.append(self.second.weight.detach().clone())
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=self.lr, **self.options)


def loader(batches: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


@pytest.fixture
def make_model() -> type[Regression]:
    return Regression


@pytest.fixture
def make_loader() -> Callable[..., DataLoader[Any]]:
    return loader


@pytest.fixture
def scaled() -> Callable[[], Any]:
    """16-mixed on a CPU, with a real GradScaler."""
    return lambda: MixedPrecision(
        precision="16-mixed",
        device="cpu",
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**3, growth_interval=1000),
    )


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Trainer]:
    """A plain Lightning trainer on one CPU, without loggers, bars and files."""

    def make(*callbacks: Any, **options: Any) -> Trainer:
        seed_everything(0, verbose=False)
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def run_on_two_ranks() -> Callable[..., str]:
    """Runs a script, or the text of one, that trains on two gloo ranks; gives its stderr."""

    def run(script: Path | str, folder: Path, *arguments: object) -> str:
        if isinstance(script, str):
            (folder / "train.py").write_text(script)
            script = folder / "train.py"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_", "NODE_"))}
        environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(script), str(folder), *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LIGHTNING_NOISE = (
    # Advice on speed, which four rows of data do not need.
    "ignore:.*does not have many workers:UserWarning",
    "ignore:The number of training batches.*is smaller than the logging:UserWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning",
    # Resumed runs save into a folder of their own.
    "ignore:The dirpath has changed:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:.*callbacks used to create the checkpoint[^.]*\\. [^.]*ModelCheckpoint:UserWarning",
    # Lightning 2.6 on torch 2.15.
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for noise in LIGHTNING_NOISE:
                item.add_marker(pytest.mark.filterwarnings(noise))
