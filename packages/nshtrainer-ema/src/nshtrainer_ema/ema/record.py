"""What a checkpoint holds of the averages, and how all sets of weights come back from it.

`state_dict` has the weights that were evaluated. The others are beside it, under a key of ours:

    checkpoint["nshtrainer_average"] = {
        "version": 1,
        "state_dict": "average" or "weights",  # which set that is
        "weights": {name: tensor},             # as trained, where state_dict does not have them
        "average": {name: tensor},             # the same for the average
        "others": {label: {name: tensor}},     # further averages
        "steps": {optimizer index: applied steps},
        "samples": {optimizer index: samples since the last update},
        "options": {option: value},            # how it came about
    }

The average is under "average" too where `state_dict` rounds it (to bf16, say) or leaves it out.
Names are of parameters and buffers. In a checkpoint that the ranks write shard by shard, the three
sets lie inside `state_dict`, under `nshtrainer_average/<set>/<name>`, and the record has their names
only: of what is outside of `state_dict`, only rank 0's is written.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from nshtrainer.errors import NshTrainerError
from nshtrainer.runtime.saving import AVERAGE_KEY

from .options import AverageOptions
from .plan import separate
from .shards import like, local, whole
from .weight_ema import WeightEMA

__all__ = ["RECORD_KEY", "RecordVersionError", "other_set", "read_record", "write_record"]

log = logging.getLogger(__name__)

RECORD_KEY: Final = AVERAGE_KEY
_VERSION: Final = 1
_SAID: Final = ("decay", "half_life_steps", "half_life_samples", "every_n_steps", "warmup")


class RecordVersionError(NshTrainerError, ValueError):
    """A checkpoint's average is in a format that this version does not know."""


def write_record(
    checkpoint: MutableMapping[str, Any],
    module: nn.Module,
    ema: WeightEMA,
    *,
    evaluates_average: bool,
    sharded: bool = False,
) -> None:
    """Put the evaluated weights into `checkpoint["state_dict"]`, and the other sets beside it.

    Args:
        checkpoint: As Lightning dumped it; its `state_dict` is replaced, not edited.
        module: The module that it is of.
        ema: The averages of its weights.
        evaluates_average: Whether the average is what was evaluated.
        sharded: Whether each rank writes its own shards. If not, sharded tensors are gathered, a
            collective.
    """
    weights: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    state: dict[str, Any] = copy.copy(checkpoint["state_dict"])  # with the versions of modules
    names, trained = _names(module), ema.trained(module)
    for name, tensor, average in ema.pairs(module):
        own, value = trained[name], average
        if not sharded:
            own, value = whole(own), separate(whole(value))
        evaluated = value if evaluates_average else own
        stored = _store(state, names[id(tensor)], evaluated)
        if not (evaluates_average and stored is evaluated):
            averages[name] = value
        if evaluates_average or stored is None:
            weights[name] = own
    others = {
        label: {n: t if sharded else separate(whole(t)) for n, t in ema.of(label).items()}
        for label in ema.labels[1:]
    }
    record: dict[str, Any] = {
        "version": _VERSION,
        "state_dict": "average" if evaluates_average else "weights",
        "weights": weights,
        "average": averages,
        "others": others,
        "steps": ema.steps,
        "samples": ema.samples,
        "options": _told(ema.options),
    }
    if sharded:
        for part, tensors in _parts(record):
            state.update({_key(part, name): tensor for name, tensor in tensors.items()})
        record.update(weights=list(weights), average=list(averages))
        record["others"] = {label: list(tensors) for label, tensors in others.items()}
    checkpoint["state_dict"] = state
    checkpoint[RECORD_KEY] = record


@torch.no_grad()
def read_record(
    checkpoint: Mapping[str, Any], module: nn.Module, ema: WeightEMA, *, folder: Path | None = None
) -> bool:
    """Put the trained weights into *module*, which has loaded `state_dict`, and the rest into *ema*.

    Args:
        checkpoint: As loaded.
        module: What the checkpoint is of.
        ema: Is given the averages and counts.
        folder: The checkpoint itself, where it is a folder of shards.

    Returns:
        Whether the checkpoint holds an average; if not, nothing is changed.

    Raises:
        RecordVersionError: A newer version wrote it.
    """
    record = _checked(checkpoint)
    if record is None:
        return False
    tensors = _tensors(module)
    record = _with_shards(record, tensors, ema, folder)
    averages: dict[str, Tensor] = dict(record["average"])
    state: Mapping[str, Any] = checkpoint.get("state_dict", {})
    names = _names(module)
    for name, own in record["weights"].items():
        tensor = tensors.get(name)
        if tensor is None:
            log.warning("the checkpoint has trained weights of %r, which the module has not", name)
            continue
        if name not in averages:
            held = (state[key] for key in names[id(tensor)] if key in state)
            averages[name] = next(held, tensor.detach().clone())
        local(tensor).copy_(local(like(own, tensor)))
    ema.restore({ema.labels[0]: averages, **record["others"]}, record["steps"], record["samples"])
    _tell_changes(record, ema)
    return True


def other_set(
    checkpoint: Mapping[str, Any], wanted: Literal["average", "weights"]
) -> dict[str, Tensor]:
    """What to put over `state_dict` to evaluate *wanted*; empty if it has those, or nothing else.

    Raises:
        RecordVersionError: A newer version wrote it.
    """
    record = _checked(checkpoint)
    if record is None or record["state_dict"] == wanted:
        return {}
    if not isinstance(record[wanted], dict):
        log.warning("the checkpoint is one of shards: it is evaluated with what its model holds")
        return {}
    return dict(record[wanted])


def _checked(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    record: Mapping[str, Any] | None = checkpoint.get(RECORD_KEY)
    if record is None:
        return None
    if record["version"] != _VERSION:
        raise RecordVersionError(
            f"the checkpoint's average has format version {record['version']}, and this "
            f"nshtrainer-ema reads version {_VERSION}; update nshtrainer-ema to resume from it."
        )
    return dict(record)


def _parts(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "weights", record["weights"]
    yield "average", record["average"]
    for label, tensors in record["others"].items():
        yield f"others/{label}", tensors


def _key(part: str, name: str) -> str:
    return f"{RECORD_KEY}/{part}/{name}"


def _with_shards(
    record: dict[str, Any], tensors: Mapping[str, Tensor], ema: WeightEMA, folder: Path | None
) -> dict[str, Any]:
    """*record* with its tensors, this rank's shards, where it has only their names."""
    if isinstance(record["weights"], dict) or folder is None:
        return record
    from torch.distributed.checkpoint import load  # pyright: ignore[reportPrivateImportUsage, reportUnknownVariableType] -- documented

    found: dict[str, dict[str, Tensor]] = {}
    for part, names in _parts(record):
        found[part] = {
            name: torch.empty_like(tensors[name], dtype=ema.dtype_of(tensors[name], part))
            for name in names
            if name in tensors
        }
    load(
        {"state_dict": {_key(p, n): t for p, held in found.items() for n, t in held.items()}},
        checkpoint_id=folder,
    )
    others = {label: found[f"others/{label}"] for label in record["others"]}
    return {**record, "weights": found["weights"], "average": found["average"], "others": others}


def _told(options: AverageOptions) -> dict[str, Any]:
    return {option: getattr(options, option) for option in _SAID}


def _tell_changes(record: Mapping[str, Any], ema: WeightEMA) -> None:
    now = _told(ema.options)
    for option, before in record["options"].items():
        if option in now and before != now[option]:
            log.warning(
                "the average goes on with %s=%s; it was %s until here", option, now[option], before
            )
    for label in ema.labels[1:]:
        if label not in record["others"]:
            log.warning("the checkpoint has no average %s; it begins from the weights", label)
    for label in record["others"]:
        if label not in ema.labels:
            log.warning("the checkpoint's average %s is not asked for any more, and ends", label)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _names(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its id; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        names.setdefault(id(buffer), []).append(name)
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
