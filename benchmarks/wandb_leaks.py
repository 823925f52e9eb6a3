"""Many fits in one process, with the W&B logger, watch and uploads: what they leave behind.

    python -m benchmarks.wandb_leaks --fits 100

W&B is offline. Exits with 1 if threads, open files, processes, trainers or hooks have become more.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Held", "growth_over_fits"]

_WARMUPS = 2  # wandb's service, torch's pools and the like are made once


@dataclass(frozen=True)
class Held:
    """What this process holds, counted by name."""

    threads: Counter[str]
    files: Counter[str]
    processes: Counter[str]
    objects: Counter[str]
    """Trainers, modules and runs that cannot be collected."""
    hooks: Counter[str]
    """On the module."""

    @classmethod
    def now(cls, module: Any) -> Held:
        """Count, after a collection of garbage; Linux only."""
        gc.collect()
        kinds = ("Trainer", "LateWandbLogger", "Run", "WandbWatchCallback", "RuntimeCallback")
        return cls(
            threads=Counter(thread.name for thread in threading.enumerate()),
            files=Counter(_open_files()),
            processes=Counter(_children()),
            objects=Counter(k for o in gc.get_objects() if (k := type(o).__name__) in kinds),
            hooks=Counter(_hooks_on(module)),
        )

    def growth(self, before: Held) -> dict[str, int]:
        """What is held now and was not *before*, and how often."""
        return {
            f"{kind}: {name}": count
            for kind, now in vars(self).items()
            for name, count in (now - getattr(before, kind)).items()
        }


def _open_files() -> list[str]:
    found: list[str] = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # that of the listing itself
        # Sockets and pipes have numbers for names.
        found.append(target.partition(":[")[0])
    return found


def _children() -> list[str]:
    found: list[str] = []
    for thread in Path("/proc/self/task").iterdir():
        children = thread / "children"
        for child in children.read_text().split() if children.exists() else ():
            try:
                found.append(Path(f"/proc/{child}/comm").read_text().strip())
            except FileNotFoundError:
                continue
    return found


def _hooks_on(module: Any) -> list[str]:
    found: list[str] = []
    for parameter in module.parameters():
        found += ["of a parameter"] * len(parameter._backward_hooks or ())
    for part in module.modules():
        found += ["of a module"] * (len(part._forward_hooks) + len(part._backward_hooks))
        found += [name for name in vars(part) if "wandb" in name]
    return found


def growth_over_fits(
    folder: Path, fits: int, method: Literal["optimizer_step", "hooks"]
) -> dict[str, int]:
    """Return what *fits* fits of one module in *folder* leave behind that the first two did not."""
    from nshtrainer import Trainer
    from nshtrainer.testing import TinyLoader, TinyModule

    config: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False,
        "directory": {"project_root": folder}, "checkpoint_saving": None,
        "loggers": [
            {
                "name": "wandb", "offline": True, "log_code": None, "log_model": "all",
                "watch": {"log": "all", "log_freq": 2, "method": method},
            }
        ],
    }  # fmt: skip
    module = TinyModule()

    def fit() -> None:
        Trainer(config).fit(module, TinyLoader(4))

    for _ in range(_WARMUPS):
        fit()
    before = Held.now(module)
    for _ in range(fits):
        fit()
    return Held.now(module).growth(before)


def main(argv: list[str] | None = None) -> int:
    """Run the fits with both methods of watching and print what has become more."""
    import tempfile

    from .workloads import quiet

    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.wandb_leaks")
    parser.add_argument("--fits", type=int, default=100, help="fits with each method")
    options = parser.parse_args(argv)
    os.environ |= {"WANDB_SILENT": "true", "WANDB_X_DISABLE_STATS": "true"}
    failed = False
    for method in ("optimizer_step", "hooks"):
        with tempfile.TemporaryDirectory() as data, quiet() as folder:
            os.environ |= {f"WANDB_{n}_DIR": data for n in ("CACHE", "CONFIG", "DATA")}
            start = time.monotonic()
            growth = growth_over_fits(folder, options.fits, method)
            seconds = time.monotonic() - start
        failed |= bool(growth)
        print(f"{method}: {options.fits} fits in {seconds:.0f} s leave {growth or 'nothing'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
