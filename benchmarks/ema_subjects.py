"""Who updates an average: nshtrainer, Lightning, torch, and the peers from PyPI."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .ema_peers import PEERS
from .ema_weights import Weights

__all__ = ["OURS", "Make", "Subject", "copy_swap", "makers", "ready"]

OURS = "nshtrainer"
_DECAY = 0.999
_WARM_UP = 3  # updates: the first ones of some only copy
_STUCK = "bf16 shadow, never moves"


@dataclass(frozen=True)
class Subject:
    """One average of one set of weights.

    Attributes:
        name: Of whoever made it.
        update: Moves the average once.
        shadows: The average, in the order of the parameters.
        swap: Puts the average in and the weights back, if that can be done apart from a run.
    """

    name: str
    update: Callable[[], object]
    shadows: list[Tensor]
    swap: Callable[[], object] | None = None


Make = Callable[[Weights], Subject]


def makers(peers: Mapping[str, Any]) -> dict[str, Make]:
    """Name -> how its average is made; *peers* are the modules of those that are not installed."""
    timm, ema_pytorch, existing = (peers.get(name) for name in PEERS)
    makes: dict[str, Make] = {OURS: _ours, "Lightning": _lightning, "swa_utils": _swa_utils}
    if timm is not None:
        makes["timm"] = lambda weights: _timm(timm, weights)
    if ema_pytorch is not None:
        makes["ema-pytorch"] = lambda weights: _ema_pytorch(ema_pytorch, weights)
    if existing is not None:
        makes["nshtrainer 1.5.4"] = lambda weights: _existing(existing, weights)
    return makes


def _ours(weights: Weights) -> Subject:
    from nshtrainer_ema import WeightEMA

    ema = WeightEMA(weights, decay=_DECAY)

    def swap_in_and_out() -> None:
        ema.swap_in(weights, outermost=weights)
        ema.swap_out()

    return Subject(
        OURS,
        update=ema.update,
        shadows=[ema.averages[name] for name, _ in weights.named_parameters()],
        swap=swap_in_and_out,
    )


def _lightning(weights: Weights) -> Subject:
    callback = EMAWeightAveraging(decay=_DECAY)
    state = SimpleNamespace(global_step=0)
    trainer = cast("Trainer", state)
    callback.setup(trainer, weights, "fit")

    def update() -> None:
        state.global_step += 1
        callback.on_train_batch_end(trainer, weights, None, None, 0)

    def swap() -> None:
        callback.on_validation_epoch_start(trainer, weights)
        callback.on_validation_epoch_end(trainer, weights)

    averaged: Any = callback._average_model  # there is no public way to it
    return Subject("Lightning EMAWeightAveraging", update, list(averaged.module.parameters()), swap)


def _swa_utils(weights: Weights) -> Subject:
    averaged = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    return Subject(
        "torch AveragedModel, multi_avg_fn",
        update=lambda: averaged.update_parameters(weights),
        shadows=list(averaged.module.parameters()),
    )


def _timm(module: Any, weights: Weights) -> Subject:
    averaged = module.ModelEmaV3(weights, decay=_DECAY, foreach=True, dtype=torch.float32)
    return Subject(
        "timm ModelEmaV3, foreach",
        update=lambda: averaged.update(weights),
        shadows=list(averaged.module.parameters()),
    )


def _ema_pytorch(module: Any, weights: Weights) -> Subject:
    averaged = module.EMA(
        weights,
        copy.deepcopy(weights).float(),
        beta=_DECAY,
        min_value=_DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        coerce_dtype=True,
    )
    return Subject(
        "ema-pytorch, foreach",
        update=averaged.update,
        shadows=list(averaged.ema_model.parameters()),
    )


def _existing(module: Any, weights: Weights) -> Subject:
    plain = torch.optim.SGD(weights.parameters(), lr=0.0)
    optimizer = module.EMAOptimizer(plain, torch.device("cpu"), _DECAY)
    optimizer.step()

    def update() -> None:
        optimizer.update()  # in a thread
        optimizer.join()

    def swap() -> None:
        optimizer.switch_main_parameter_weights()
        optimizer.switch_main_parameter_weights()

    update()
    return Subject("nshtrainer 1.5.4", update, list(optimizer.ema_params), swap)


def copy_swap(weights: Weights, shadows: list[Tensor]) -> Callable[[], object]:
    """The fastest swap by copy: three copies, into memory that is there already."""
    parameters = [parameter.detach() for parameter in weights.parameters()]
    backups = [parameter.clone() for parameter in parameters]
    foreach_copy: Callable[..., object] = vars(torch)["_foreach_copy_"]

    def swap() -> None:
        foreach_copy(backups, parameters)
        foreach_copy(parameters, shadows)
        foreach_copy(parameters, backups)

    return swap


def ready(make: Make, weights: Weights) -> Subject:
    """Make an average, check that an update does what it should, and name it accordingly.

    Raises:
        RuntimeError: It moves, but not to where it should.
    """
    subject = make(weights)
    for _ in range(_WARM_UP):
        subject.update()
    checked = list(zip(weights.parameters(), subject.shadows, strict=True))[-20:]
    before = [shadow.detach().float().clone() for _, shadow in checked]
    _scale(weights, 0.5)
    subject.update()
    moves = [s.detach().float() - b for (_, s), b in zip(checked, before, strict=True)]
    wanted = [
        (1 - _DECAY) * (p.detach().float() - b) for (p, _), b in zip(checked, before, strict=True)
    ]
    _scale(weights, 2)
    for _ in range(_WARM_UP):
        subject.update()
    if not any(move.any() for move in moves):
        return replace(subject, name=f"{subject.name} ({_STUCK})")
    for move, want in zip(moves, wanted, strict=True):
        if not torch.allclose(move, want, rtol=0.05, atol=1e-8):
            raise RuntimeError(f"{subject.name} does not move its average as an EMA does")
    return subject


@torch.no_grad()
def _scale(weights: nn.Module, factor: float) -> None:
    for parameter in weights.parameters():
        parameter.mul_(factor)  # a power of two is exact, so that the weights come back
