from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import resume_runs as runs
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

import nshtrainer

pytestmark = [
    # Lightning cannot know that ours makes it resumable.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    # Six batches an epoch, and an IterableDataset without a length.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Called by Lightning when a worker's loader is made.
    pytest.mark.filterwarnings("ignore:.*use_fork.*|.*multi-threaded.*fork"),
    # A validation that shuffles draws, and so must be resumed too.
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
]


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(runs.Noisy(), batch_size=4, shuffle=True, **options)


def given_generator() -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(5))


def weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler([1.0 + i for i in range(24)], 24)
    return DataLoader(runs.Noisy(), batch_size=4, sampler=sampler)


def stream() -> DataLoader[Any]:
    return DataLoader(runs.Stream(), batch_size=4)


def together() -> dict[str, DataLoader[Any]]:
    return {"a": shuffled(), "b": DataLoader(runs.Noisy(8), batch_size=4, shuffle=True)}


# Six batches an epoch, validation after the third and the sixth.
MOMENTS = [
    ("batch", 1), ("batch", 3), ("batch", 4), ("batch", 6), ("batch", 8), ("batch", 9),
    ("batch", 12), ("validation_start", 3), ("validation_start", 6), ("validation_end", 3),
    ("validation_end", 6), ("validation_end", 9), ("validation_end", 12), ("epoch_end", 6),
    ("epoch_end", 12),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "step"), MOMENTS)
@pytest.mark.parametrize("whose", ["lightning", "ours"])
def test_every_moment(tmp_path: Path, hook: str, step: int, whose: str):
    """N steps == k, killed, N - k: in, between and after validations, and at both ends of epochs."""

    def ours(callbacks: list[Any], **options: Any) -> nshtrainer.Trainer:
        del options["logger"]
        values = {**options, "loggers": [], "directory": {"project_root": tmp_path}}
        config = nshtrainer.TrainerConfig.model_validate(values)
        return nshtrainer.Trainer(config, callbacks=callbacks)

    make = ours if whose == "ours" else runs.pl.Trainer
    runs.compare(tmp_path / "x.ckpt", hook, step, shuffled, make=make, val_check_interval=3)


@pytest.mark.parametrize(("hook", "step"), [("batch", 8), ("batch", 6), ("validation_end", 9), ("epoch_end", 6)])  # fmt: skip
@pytest.mark.parametrize("train", [given_generator, weighted, stream, together])
def test_every_loader(tmp_path: Path, hook: str, step: int, train: Any):
    """Own generators, samplers that draw late, a shuffling stream, a shorter loader that cycles."""
    runs.compare(tmp_path / "x.ckpt", hook, step, train, val_check_interval=3)


@pytest.mark.parametrize(("hook", "step"), [("batch", 7), ("batch", 6), ("validation_end", 12), ("epoch_end", 6), ("epoch_end", 12)])  # fmt: skip
@pytest.mark.parametrize("plateau", [False, True])
def test_limits_in_steps(tmp_path: Path, hook: str, step: int, plateau: bool):
    """With max_steps as the limit, and with a plateau scheduler that follows the validation."""
    runs.compare(tmp_path / "x.ckpt", hook, step, shuffled, plateau=plateau, max_steps=16, max_epochs=-1)  # fmt: skip
    runs.compare(tmp_path / "x.ckpt", hook, step, shuffled, plateau=plateau)


@pytest.mark.parametrize("hook", ["train_end"])
@pytest.mark.parametrize(("limit", "step", "more"), [("max_epochs", 6, 1), ("max_steps", 4, 4), ("max_steps", 6, 6)])  # fmt: skip
def test_a_longer_run_goes_on(tmp_path: Path, hook: str, limit: str, step: int, more: int):
    """What was saved when a limit was reached goes on as if the limit had been higher."""
    options: dict[str, Any] = {"max_steps": 16, "max_epochs": -1} if limit == "max_steps" else {}
    runs.compare(tmp_path / "x.ckpt", hook, step, shuffled, first={limit: more}, until=options)


@pytest.mark.parametrize(("hook", "step"), [("batch", 2), ("validation_end", 3), ("validation_end", 1), ("epoch_end", 3)])  # fmt: skip
def test_accumulation(tmp_path: Path, hook: str, step: int):
    """Gradients that were accumulated when a validation saved are there again."""
    runs.compare(tmp_path / "x.ckpt", hook, step, shuffled, accumulate_grad_batches=2, val_check_interval=3)  # fmt: skip


@pytest.mark.parametrize("step", [3, 4, 6, 9, 12])
@pytest.mark.parametrize("hook", ["batch_settled", "validation_settled"])
def test_what_the_module_does_in_its_last_hooks_is_in_the_file(
    tmp_path: Path, hook: str, step: int
):
    """Saved after the module's `on_train_batch_end` and `on_validation_end`, not before them."""
    if hook == "batch_settled" or step % 3 == 0:
        runs.compare(
            tmp_path / "x.ckpt", hook, step, shuffled, acts_late=True, val_check_interval=3
        )


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "step"), [("batch", 8), ("validation_end", 9), ("epoch_end", 6)])
@pytest.mark.parametrize("dataset", ["map", "stream"])
def test_workers(tmp_path: Path, hook: str, step: int, dataset: str):
    """What two worker processes draw is drawn again."""

    def train() -> DataLoader[Any]:
        data = runs.Noisy() if dataset == "map" else runs.Stream(12)
        shuffle = {"shuffle": True} if dataset == "map" else {}
        return DataLoader(data, batch_size=4, num_workers=2, **shuffle)

    runs.compare(tmp_path / "x.ckpt", hook, step, train, val_check_interval=3)
