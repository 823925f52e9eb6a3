"""What a checkpoint costs: time on disk, time that training waits, and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .checkpoint_processes import EXISTING, Processes, existing_python
from .method import Comparison, Settings
from .registry import benchmark

_MB = 1_000_000
_SIZES, _QUICK_SIZES = (10, 100, 500), (1,)
_SMALL = 100_000
_FEW, _MANY, _QUICK_MANY = 10, 1000, 20

_BARE = "torch.save and fsync"
_LIGHTNING = "Lightning's ModelCheckpoint"
_OURS = "nshtrainer"
_ASYNC = "nshtrainer, async_save"
_COPY = "a copy to CPU memory"


@benchmark("checkpoint", "saving, its stall and its memory, against torch.save and a bare copy")
def checkpoint(settings: Settings) -> Iterator[Comparison]:
    """Linear layers with Adam's state; one save after one training step a sample."""
    python = existing_python(install=not settings.is_quick)
    peers = {_LIGHTNING: "lightning"} | ({EXISTING: "existing"} if python else {})
    left_out = "" if python else f" (without {EXISTING})"
    for size in _QUICK_SIZES if settings.is_quick else _SIZES:
        with Processes(python) as processes:
            for comparison in _of_size(processes, size * _MB, peers):
                yield replace(comparison, case=f"{size} MB{left_out}: {comparison.case}")
    many = _QUICK_MANY if settings.is_quick else _MANY
    with Processes(python) as processes:
        yield Comparison(
            case="a small state: a save beside others",
            baseline=f"{_FEW} checkpoints",
            samplers={f"{n} checkpoints": processes.time("ours", _SMALL, n) for n in (_FEW, many)},
            limits={f"{many} checkpoints": 1.2},
        )


def _of_size(processes: Processes, num_bytes: int, peers: dict[str, str]) -> Iterator[Comparison]:
    subjects = {_OURS: "ours", **peers}
    yield Comparison(
        case="a save",
        baseline=_BARE,
        samplers={
            name: processes.time(kind, num_bytes)
            for name, kind in {_BARE: "bare", **subjects}.items()
        },
        limits={_OURS: 1.1},
    )
    stall = processes.time("async", num_bytes)
    yield Comparison(
        case="how long training waits",
        baseline=_COPY,
        samplers={_COPY: processes.time("copy", num_bytes), _ASYNC: stall},
        limits={_ASYNC: 1.2},
    )
    yield Comparison(
        case="how long training waits",
        baseline=_OURS,
        samplers={_OURS: processes.time("ours", num_bytes), _ASYNC: stall},
        limits={_ASYNC: 0.1},
    )
    yield Comparison(
        case="extra memory of a save",
        baseline="the state",
        samplers={
            name: processes.memory(kind, num_bytes)
            for name, kind in {"the state": "state", **subjects}.items()
        },
        limits={_OURS: 0.2},
        unit="B",
    )
