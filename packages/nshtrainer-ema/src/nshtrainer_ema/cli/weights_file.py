"""The file that `nshtrainer ema reconstruct` writes: averaged weights, alone or put into a checkpoint."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from nshtrainer.cli.output import OutputError
from nshtrainer.errors import ConfigError
from nshtrainer.files import put_in_place, temporary_path
from nshtrainer.runtime.saving import AVERAGE_KEY
from nshtrainer_ema.ema.snapshots import Reconstruction

__all__ = ["RECONSTRUCTION_KEY", "Written", "check_output", "read_base", "write_weights"]

RECONSTRUCTION_KEY: Final = "nshtrainer_reconstruction"
"""Where a written checkpoint says what its weights are."""

_ENDINGS: Final = (".ckpt", ".pt", ".safetensors")
_OF_TRAINING: Final = ("optimizer_states", "lr_schedulers", "callbacks", AVERAGE_KEY)
"""Parts of a checkpoint that belong to its own weights, and would be wrong beside others."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    tensors: int
    size: int
    """Bytes of the file."""


def check_output(out: Path, *, replace: bool) -> None:
    """Refuse what `write_weights` could not write, before anything is computed.

    Raises:
        ConfigError: The ending is unknown, the file is there, or safetensors is not installed.
    """
    if out.suffix not in _ENDINGS:
        raise ConfigError(
            f"the ending of {out} does not say what to write; choose one of {', '.join(_ENDINGS)}"
        )
    if out.exists() and not replace:
        raise ConfigError(f"{out} is there already; choose another name, or replace it (--force)")
    if out.suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise ConfigError(
            "safetensors is not installed; run `pip install safetensors`, or write a .pt file"
        )


def read_base(path: Path) -> dict[str, Any]:
    """Read the checkpoint *path*, mapped, without running code from it.

    Raises:
        ConfigError: It is missing, of another kind, or cannot be read.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; give a checkpoint of one file, or a link to one")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path} cannot be read without running code from it ({reason}); give a checkpoint of "
            "plain data"
        ) from error
    checkpoint = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise ConfigError(f"{path} has no `state_dict`; give a checkpoint of a Lightning module")
    return checkpoint


def write_weights(
    out: Path, tensors: Mapping[str, Tensor], made: Reconstruction, base: Mapping[str, Any] | None
) -> Written:
    """Write *tensors* to *out*, whole or not at all.

    Args:
        out: Its ending says the form: `.ckpt` is a checkpoint, `.pt` and `.safetensors` hold names and
            tensors. Folders are made.
        tensors: The average, by parameter name.
        made: What it is, to be noted in the file (but in a `.pt`).
        base: A checkpoint to put it into: of the rest of its `state_dict` nothing is lost.

    Raises:
        ConfigError: *base* is of another model.
        OutputError: *out* cannot be written.
    """
    state = dict(tensors) if base is None else _put_into(base["state_dict"], tensors)
    temporary = temporary_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".safetensors":
            _save_safetensors(state, temporary, made)
        elif out.suffix == ".ckpt":
            torch.save(_checkpoint(state, made, base or {}), temporary)
        else:
            torch.save(state, temporary)
        put_in_place(temporary, out)
        return Written(len(state), out.stat().st_size)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OutputError(f"{out} cannot be written: {error}; choose another file") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _put_into(held: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """*held* with the values of *tensors*, in its own dtypes; the average has one name of tied weights."""
    for name, tensor in tensors.items():
        there = held.get(name)
        if not isinstance(there, Tensor) or there.shape != tensor.shape:
            what = f"of shape {list(there.shape)}" if isinstance(there, Tensor) else "missing"
            raise ConfigError(
                f"the checkpoint is of another model than the snapshots: {name!r} is {what} there, "
                f"and of shape {list(tensor.shape)} here. Give a checkpoint of the same run."
            )
    values = {name: tensor.to(held[name].dtype) for name, tensor in tensors.items()}
    tied = {_memory(held[n]): value for n, value in values.items() if value.numel()}
    state: dict[str, Any] = {}
    for name, value in held.items():
        other = tied.get(_memory(value), value) if isinstance(value, Tensor) else value
        state[name] = values.get(name, other)
    return state


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _checkpoint(
    state: dict[str, Any], made: Reconstruction, base: Mapping[str, Any]
) -> dict[str, Any]:
    kept = {key: value for key, value in base.items() if key not in _OF_TRAINING}
    facts = {
        "version": 1,
        "step": made.step,
        "sigma_rel": made.sigma_rel,
        "profile_error": made.error,
        "num_snapshots": len(made.parts),
    }
    return {**kept, "state_dict": state, RECONSTRUCTION_KEY: facts}


def _save_safetensors(state: Mapping[str, Any], path: Path, made: Reconstruction) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] -- its PathLike has no argument

    # The format knows no two names for one memory: each gets its own copy.
    save_file(
        {n: v.detach().clone().contiguous() for n, v in state.items() if isinstance(v, Tensor)},
        path,
        metadata={
            "format": "pt",
            "weights": f"average of sigma_rel={made.sigma_rel!r} at step {made.step}",
        },
    )
