"""Trains on two gloo ranks in new processes; arguments: folder, seed, save at step, resume, workers."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from runs import QUIET, DeadError, Model, Noisy, SaveAt, outcome, seed
from torch.utils.data import DataLoader


def main() -> None:
    folder, number, step, resume, workers = Path(sys.argv[1]), *map(int, sys.argv[2:])
    warnings.simplefilter("ignore")  # what Lightning says of small loaders is no part of the test
    path = folder / "x.ckpt"
    callback = SaveAt(path, "batch" if step else "", step, dies=bool(step))
    options = {**QUIET, "devices": 2, "strategy": "ddp", "max_epochs": 3, "use_distributed_sampler": True}  # fmt: skip
    trainer = pl.Trainer(callbacks=[callback], num_sanity_val_steps=0, **options)
    seed(number + 10 * trainer.global_rank)
    data = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
    val = DataLoader(Noisy(8), batch_size=4)
    try:
        trainer.fit(Model(), data, val, ckpt_path=path if resume else None)
    except DeadError:
        return
    result = {**outcome(trainer), "seen": trainer.lightning_module.seen}
    torch.save(result, folder / f"{'resumed' if resume else 'straight'}{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
