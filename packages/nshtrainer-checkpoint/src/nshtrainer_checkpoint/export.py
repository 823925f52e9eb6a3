"""The weights of a checkpoint as a file of their own."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nshtrainer.errors import ConfigError
from nshtrainer.files import put_in_place, temporary_path
from nshtrainer.runtime.saving import AVERAGE_KEY

from .metadata import read_record, sidecar_of
from .verify import damage

__all__ = ["Exported", "export"]

_EMA_VERSION = 1


@dataclass(frozen=True)
class Exported:
    """What was written."""

    what: str
    """Which weights, for a person."""
    tensors: int
    size: int
    """Bytes of the file."""
    step: int | None


def export(
    source: str | Path,
    out: str | Path,
    *,
    weights: Literal["evaluated", "raw", "ema"] = "evaluated",
    kind: Literal["pt", "safetensors"] | None = None,
    replace: bool = False,
) -> Exported:
    """Write the weights of the checkpoint *source*, by parameter name, to the file *out*.

    A checkpoint with metadata of ours is verified first. It is read with `weights_only=True`, so no
    code of it runs.

    Args:
        source: A checkpoint, or a link to one; of Lightning's own too.
        out: Read it with `torch.load`, or with `safetensors.torch.load_file`.
        weights: `evaluated` is what validation used and `state_dict` holds; `raw` is what the
            optimizer trains; `ema` is their exponential moving average.
        kind: None is `safetensors` for a name that ends so, else `pt`.
        replace: Whether *out* may be there already.

    Raises:
        ConfigError: *source* is missing, damaged or of another kind, or has no such weights; *out* is
            there; or safetensors is not installed.
        OSError: *out* cannot be written.
    """
    source, out = Path(source).resolve(), Path(out)
    if kind is None:
        kind = "safetensors" if out.suffix == ".safetensors" else "pt"
    if out.exists() and not replace:
        raise ConfigError(f"{out} is there already; choose another name, or replace it (--force)")
    checkpoint = _read(source)
    what, state = _choose(source, checkpoint, weights)
    temporary = temporary_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if kind == "safetensors":
            _save_safetensors(state, temporary, what)
        else:
            torch.save({name: tensor.clone() for name, tensor in state.items()}, temporary)
        put_in_place(temporary, out)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    step = checkpoint.get("global_step")
    return Exported(what, len(state), out.stat().st_size, step if isinstance(step, int) else None)


def _read(source: Path) -> dict[str, Any]:
    if not source.exists():
        raise ConfigError(f"{source} does not exist; give a checkpoint, or a link to one")
    if source.is_dir():
        raise ConfigError(
            f"{source} is a folder of shards; make one file of it first, with "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        )
    record = None
    with contextlib.suppress(OSError, ValueError):
        record = read_record(sidecar_of(source), source)
    if record is not None and (why := damage(record)) is not None:
        raise ConfigError(
            f"{source} is damaged: {why}; `nshtrainer checkpoint verify` names a good one"
        )
    try:
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{source} cannot be read without running code from it ({reason}); give a checkpoint of "
            "plain data"
        ) from error
    state: Any = loaded.get("state_dict") if isinstance(loaded, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- of whatever file
    if not isinstance(state, dict):
        raise ConfigError(f"{source} has no `state_dict`; give a checkpoint of a Lightning module")
    return cast("dict[str, Any]", loaded)


def _choose(
    source: Path, checkpoint: dict[str, Any], weights: Literal["evaluated", "raw", "ema"]
) -> tuple[str, dict[str, Tensor]]:
    """The weights that are asked for, and what they are."""
    held = cast("dict[str, Any]", checkpoint["state_dict"])
    state = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    record: Any = checkpoint.get(AVERAGE_KEY)
    if record is None:
        if weights == "ema":
            raise ConfigError(
                f"{source} has no moving average: it was saved without `ema`. Leave out --weights to "
                "get what it has."
            )
        return "trained weights", state
    if record.get("version") != _EMA_VERSION:
        raise ConfigError(
            f"the moving average in {source} is of version {record.get('version')!r}, and this "
            f"version of nshtrainer-checkpoint knows {_EMA_VERSION}; upgrade it"
        )
    is_average = record["state_dict"] == "average"
    if weights == "evaluated":
        return ("moving average" if is_average else "trained weights"), state
    part = "average" if weights == "ema" else "weights"
    return (
        "moving average" if weights == "ema" else "trained weights",
        _with(state, record.get(part, {})),
    )


def _with(state: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """*state* with the values of *other*, which has one name alone of tied weights."""
    by_memory = {_memory(state[n]): v for n, v in other.items() if n in state and v.numel()}
    replaced = {n: by_memory.get(_memory(v), v) for n, v in state.items()}
    return {**replaced, **other}


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _save_safetensors(state: dict[str, Tensor], path: Path, what: str) -> None:
    try:
        from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] -- its PathLike has no argument
    except ImportError:
        raise ConfigError(
            "safetensors is not installed; run `pip install "
            '"nshtrainer-checkpoint[safetensors]"`, or write a `pt` file'
        ) from None
    # The format knows no two names for one memory: each gets its own copy.
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in state.items()},
        path,
        metadata={"format": "pt", "weights": what},
    )
