# ruff: noqa: S311 -- these random numbers are the subject, and no secret
from __future__ import annotations

import io
import random

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from nshtrainer_checkpoint.resume import rng


def _draw(*generators: torch.Generator) -> list[float]:
    own = [torch.rand((), generator=g).item() for g in generators]
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(), *own]  # fmt: skip


def test_what_was_read_is_drawn_again_after_a_trip_through_a_file():
    """Python, NumPy, torch and given generators; gaussian halves that wait are kept."""
    own = torch.Generator().manual_seed(3)
    random.gauss(0, 1), np.random.randn()  # each leaves a second number waiting
    file = io.BytesIO()
    torch.save(rng.read([own]), file)
    first = _draw(own)
    file.seek(0)
    rng.put_back(torch.load(file, weights_only=True), [own])

    assert _draw(own) == first


def test_reading_draws_nothing():
    """Two reads in a row are the same, and so is what is drawn next."""
    state = rng.read()
    rng.read()
    after = _draw()
    rng.put_back(state)

    assert _draw() == after


def test_generators_are_found_wherever_a_loader_keeps_them():
    """On the loader, on its sampler and below its batch sampler, each one once."""
    a, b = torch.Generator(), torch.Generator()
    below = BatchSampler(RandomSampler(range(4), generator=b), 2, drop_last=False)
    loaders = [DataLoader(range(4), shuffle=True, generator=a), DataLoader(range(4), batch_sampler=below)]  # fmt: skip

    assert rng.generators_of(loaders) == [a, b]
