"""`nshtrainer ema`: list snapshots, and reconstruct averages; only `reconstruct` reads torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nshtrainer.quantities import age_text, size_text
from nshtrainer_ema.ema.power_function import MAX_ERROR, gamma_of
from nshtrainer_ema.ema.snapshots import (
    SNAPSHOT_FOLDER,
    Reconstruction,
    Snapshot,
    SnapshotNotFoundError,
    list_snapshots,
    plan_reconstruction,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .weights_file import Written

__all__ = ["ema"]

_HEAD = ("step", "sigma_rel", "size", "age", "file")


def _here(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """A path of this machine; what lies in a store has to be fetched first."""
    if value is not None and "://" in value:
        raise click.BadParameter(
            f"{value} is a URL; these commands work on files of this machine. Fetch it with the "
            "store's own tool first.",
            ctx,
            param,
        )
    return None if value is None else Path(value).expanduser()


_PLACE = click.argument("path", callback=_here, metavar="RUN_DIR")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group()
def ema() -> None:
    """List snapshots of averaged weights, and reconstruct other averages.

    RUN_DIR is a run, with its snapshots in the folder `ema`, or a folder of snapshots.
    """


@ema.command("list")
@_PLACE
@_JSON
def list_command(path: Path, as_json: bool) -> None:
    """Show the snapshots of RUN_DIR, newest first; none is opened."""
    found = [_described(s) for s in reversed(list_snapshots(_folder_of(path)))]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo("\n".join(_table([_row(one) for one in found])))
    size = sum(one["size_bytes"] for one in found)
    click.echo(f"{len(found)} snapshots, {size_text(size)}")


@ema.command("reconstruct")
@_PLACE
@click.option("--sigma-rel", type=float, required=True, help="Width of the average: 0.1, say.")
@click.option(
    "--step", type=click.IntRange(min=1), help="Where it ends; without it, at the last snapshot."
)
@click.option(
    "--output",
    "-o",
    callback=_here,
    required=True,
    help="The file to write: .safetensors or .pt for names and tensors, .ckpt for a checkpoint.",
)
@click.option(
    "--checkpoint",
    "base",
    callback=_here,
    help="A checkpoint of the run: all that was not averaged is taken from it.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    default=MAX_ERROR,
    show_default=True,
    help="How far the profile may be from the one that is asked for.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@_JSON
def reconstruct_command(
    path: Path,
    sigma_rel: float,
    step: int | None,
    output: Path,
    base: Path | None,
    max_error: float,
    force: bool,
    as_json: bool,
) -> None:
    """Write the average of any width, at any step, made of the snapshots of RUN_DIR.

    Without --checkpoint the file has the averaged tensors alone. With it, the file has the whole
    `state_dict` of that checkpoint with the average put in; a .ckpt is then loaded by
    `Model.load_from_checkpoint`. It cannot be resumed from.
    """
    gamma_of(sigma_rel)  # before torch, which takes its time
    from .weights_file import check_output, read_base, write_weights

    check_output(output, replace=force)
    checkpoint = None if base is None else read_base(base)
    plan = plan_reconstruction(
        _folder_of(path), sigma_rel=sigma_rel, step=step, max_error=max_error
    )
    tensors = _tensors(plan, quiet=as_json)
    written = write_weights(output, tensors, plan, checkpoint)
    if as_json:
        click.echo(json.dumps(_report(output, plan, written), indent=2))
        return
    source = f"{len(plan.parts)} snapshots" if len(plan.parts) > 1 else "the snapshot itself"
    click.echo(
        f"wrote {output}: {written.tensors} tensors, {size_text(written.size)}, sigma_rel="
        f"{sigma_rel:g} at step {plan.step} from {source}; error of the profile {plan.error:.2%}",
        err=True,
    )


def _folder_of(path: Path) -> Path:
    """The folder of snapshots that *path* is or has.

    Raises:
        SnapshotNotFoundError: There is none, or it is empty.
    """
    for folder in (path / SNAPSHOT_FOLDER, path):
        if list_snapshots(folder):
            return folder
    what = "has no snapshot of an average" if path.exists() else "does not exist"
    raise SnapshotNotFoundError(
        f"{path} {what}; give the directory of a run whose callback `ema` has written snapshots, or "
        "the folder with them"
    )


def _tensors(plan: Reconstruction, *, quiet: bool) -> dict[str, Tensor]:
    if quiet:
        return plan.tensors()
    # Shown on a terminal only, and apart from results.
    with click.progressbar(length=len(plan.parts), label="snapshots", file=sys.stderr) as bar:
        return plan.tensors(lambda _done, _all: bar.update(1))


def _described(snapshot: Snapshot) -> dict[str, Any]:
    try:
        status = snapshot.path.stat()
    except OSError:  # it has gone since the folder was read
        size, age = 0, None
    else:
        size, age = status.st_size, max(time.time() - status.st_mtime, 0.0)
    return {
        "path": str(snapshot.path),
        "step": snapshot.step,
        "sigma_rel": snapshot.sigma_rel,
        "size_bytes": size,
        "age_seconds": age,
    }


def _report(output: Path, plan: Reconstruction, written: Written) -> dict[str, Any]:
    return {
        "output": str(output),
        "step": plan.step,
        "sigma_rel": plan.sigma_rel,
        "profile_error": plan.error,
        "tensors": written.tensors,
        "size_bytes": written.size,
        "snapshots": [{"path": str(s.path), "weight": weight} for s, weight in plan.parts],
    }


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(one["step"]),
        f"{one['sigma_rel']:g}",
        size_text(one["size_bytes"]),
        age_text(one["age_seconds"]),
        Path(one["path"]).name,
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """*rows* under a head; numbers to the right, and the file, at the end, as long as it is."""
    lines = [_HEAD, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD) - 1)]
    return [
        "".join(f"  {cell.rjust(width)}" for cell, width in zip(line, widths, strict=False))
        + f"  {line[-1]}"
        for line in lines
    ]
