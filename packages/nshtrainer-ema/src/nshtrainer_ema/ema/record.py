"""What a checkpoint holds of the average, and how both sets of weights come back from it.

`state_dict` has the weights that were evaluated. The other set is beside it, under a key of ours:

    checkpoint["nshtrainer_average"] = {
        "version": 1,
        "state_dict": "average" or "weights",  # which set that is
        "weights": {name: tensor},             # as trained, where state_dict does not have them
        "average": {name: tensor},             # the same for the average
        "steps": {optimizer index: applied steps},
        "decay": float, "every_n_steps": int,  # how it came about
    }

The average is under "average" too where `state_dict` rounds it (to bf16, say) or leaves it out.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from nshtrainer.errors import NshTrainerError
from nshtrainer.runtime.saving import AVERAGE_KEY

from .averaging import WeightAverage

__all__ = ["RECORD_KEY", "RecordVersionError", "read_record", "write_record"]

log = logging.getLogger(__name__)

RECORD_KEY: Final = AVERAGE_KEY
_VERSION: Final = 1


class RecordVersionError(NshTrainerError, ValueError):
    """A checkpoint's average is in a format that this version does not know."""


def write_record(
    checkpoint: MutableMapping[str, Any],
    module: nn.Module,
    average: WeightAverage,
    *,
    trained: Mapping[int, Tensor],
    evaluates_average: bool,
) -> None:
    """Put the evaluated weights into `checkpoint["state_dict"]`, and the other set beside it.

    Args:
        checkpoint: As Lightning dumped it; its `state_dict` is replaced, not edited.
        module: The module that it is of.
        average: The average of its weights.
        trained: Parameter id to trained weights, for parameters that hold others at the moment.
        evaluates_average: Whether the average is what was evaluated.
    """
    weights: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    state: dict[str, Any] = copy.copy(checkpoint["state_dict"])  # with the versions of modules
    names = _names(module)
    for name, parameter, value in average.pairs(module):
        own = trained.get(id(parameter), parameter.detach())
        evaluated = value if evaluates_average else own
        stored = _store(state, names[id(parameter)], evaluated)
        if not (evaluates_average and stored is evaluated):
            averages[name] = value
        if evaluates_average or stored is None:
            weights[name] = own
    checkpoint["state_dict"] = state
    checkpoint[RECORD_KEY] = {
        "version": _VERSION,
        "state_dict": "average" if evaluates_average else "weights",
        "weights": weights,
        "average": averages,
        "steps": average.steps,
        "decay": average.decay,
        "every_n_steps": average.every_n_steps,
    }


@torch.no_grad()
def read_record(checkpoint: Mapping[str, Any], module: nn.Module, average: WeightAverage) -> bool:
    """Put the trained weights into *module*, which has loaded `state_dict`, and the rest into *average*.

    Returns:
        Whether the checkpoint holds an average; if not, nothing is changed.

    Raises:
        RecordVersionError: A newer version wrote it.
    """
    record: Mapping[str, Any] | None = checkpoint.get(RECORD_KEY)
    if record is None:
        return False
    if record["version"] != _VERSION:
        raise RecordVersionError(
            f"the checkpoint's average has format version {record['version']}, and this "
            f"nshtrainer-ema reads version {_VERSION}; update nshtrainer-ema to resume from it."
        )
    weights: Mapping[str, Tensor] = record["weights"]
    averages: dict[str, Tensor] = dict(record["average"])
    state: Mapping[str, Any] = checkpoint["state_dict"]
    names = _names(module)
    parameters = dict(module.named_parameters())
    for name, own in weights.items():
        parameter = parameters.get(name)
        if parameter is None:
            log.warning("the checkpoint has trained weights of %r, which the module has not", name)
            continue
        if name not in averages:
            averages[name] = next(state[key] for key in names[id(parameter)] if key in state)
        parameter.copy_(own)
    average.restore(averages, record["steps"])
    for option in ("decay", "every_n_steps"):
        before, now = record[option], getattr(average, option)
        if before != now:
            log.info("the average goes on with %s=%s; it was %s until here", option, now, before)
    return True


def _names(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _store(state: dict[str, Any], names: list[str], value: Tensor) -> Tensor | None:
    """Put *value* under those of *names* that *state* has; return what is there now, if anything.

    A module's `on_save_checkpoint` may have left some out, or cast them.
    """
    stored: Tensor | None = None
    for name in names:
        if (present := state.get(name)) is not None:
            if stored is None:
                stored = value if present.dtype == value.dtype else value.to(present.dtype)
            state[name] = stored
    return stored
