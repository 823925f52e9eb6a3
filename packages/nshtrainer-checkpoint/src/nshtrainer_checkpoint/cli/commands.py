"""`nshtrainer checkpoint`: list, verify, prune and export checkpoints; only `export` reads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from nshtrainer.errors import ConfigError
from nshtrainer.quantities import size_text
from nshtrainer_checkpoint.places import is_url

from .found import Found, default_root, find, latest_first
from .pruning import Pruned, Wish, plan_pruning
from .text import ages, rows_of, table
from .verification import Checked, check_all

__all__ = ["checkpoint"]


def _here(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """A path of this machine; what lies in a store has to be fetched first."""
    if value is not None and is_url(value):
        raise click.BadParameter(
            f"{value} is a URL; these commands work on folders of this machine. Fetch it with the "
            "store's own tool first.",
            ctx,
            param,
        )
    return None if value is None else Path(value).expanduser()


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A size, read as the configuration does."""
    try:
        return None if value is None else int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise click.BadParameter(
            f"{value!r} is no size; give bytes, or text such as 20GB", ctx, param
        ) from None


_PLACE = click.argument("path", callback=_here, required=False)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_POSITIVE = click.IntRange(min=1)


@click.group()
def checkpoint() -> None:
    """List, verify, prune and export checkpoints.

    PATH is a folder of runs, a run, a folder of checkpoints, one checkpoint or a link to one; without
    it, the nearest `nshtrainer_logs` is meant.
    """


@checkpoint.command("list")
@_PLACE
@_JSON
def list_command(path: Path | None, as_json: bool) -> None:
    """Show the checkpoints below PATH, newest run first.

    Nothing is opened but their metadata. What is unfinished or has no readable metadata is shown as
    such.
    """
    found = latest_first(find(path or default_root()))
    if as_json:
        click.echo(json.dumps([_as_json(f) for f in found], indent=2))
    else:
        click.echo("\n".join(_listing(found)))


@checkpoint.command("verify")
@_PLACE
@click.option("--fast", is_flag=True, help="Compare sizes only; the content is not read.")
@_JSON
@click.pass_context
def verify_command(ctx: click.Context, path: Path | None, fast: bool, as_json: bool) -> None:
    """Compare the checkpoints below PATH with the size and SHA-256 of their metadata.

    Nothing is unpickled. The exit status is 1 if one is damaged.
    """
    checked = check_all(latest_first(find(path or default_root())), fast=fast)
    damaged = [c for c in checked if c.verdict == "damaged"]
    if as_json:
        click.echo(json.dumps([_verdict(c) for c in checked], indent=2))
    else:
        for one in checked:
            click.echo(f"{one.verdict:<12} {one.found.path}")
            if one.why:
                click.echo(f"{'':<12} {one.why}")
            if one.before is not None:
                click.echo(f"{'':<12} the good one before it is {one.before.path}")
        whole = sum(c.verdict == "ok" for c in checked)
        click.echo(
            f"{whole} whole, {len(damaged)} damaged, {len(checked) - whole - len(damaged)} that "
            "cannot be told"
        )
    if damaged:
        ctx.exit(1)


@checkpoint.command("prune")
@click.argument("path", callback=_here)
@click.option("--keep-last", type=_POSITIVE, help="Keep this many newest ones of each run.")
@click.option("--keep-best", type=_POSITIVE, help="Keep this many with the best metric.")
@click.option("--metric", help="What is best; without it, what the run itself ranked by.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Which values of it are better.")
@click.option("--keep-every", type=_POSITIVE, help="Keep those at multiples of this many steps.")
@click.option("--max-size", callback=_bytes, help="Delete until a run has this many bytes: 20GB.")
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_JSON
def prune_command(
    path: Path,
    keep_last: int | None,
    keep_best: int | None,
    metric: str | None,
    mode: Literal["min", "max"] | None,
    keep_every: int | None,
    max_size: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete checkpoints below PATH that no option keeps.

    What a link such as `last.ckpt` leads to stays, and so does everything that is unfinished, without
    readable metadata or of another program.
    """
    if keep_last is None and keep_best is None and max_size is None:
        raise click.UsageError("say what is to stay: --keep-last, --keep-best or --max-size")
    if as_json and not (dry_run or yes):
        raise click.UsageError("--json cannot ask; add --dry-run or --yes")
    wish = Wish(keep_last, keep_best, metric, mode, keep_every, max_size)
    pruned = plan_pruning(find(path), wish)
    if not as_json:
        click.echo("\n".join(_preview(pruned)))
    failed: list[Path] = []
    if pruned.removed and not dry_run:
        if not yes and not as_json:
            click.confirm(f"Delete {len(pruned.removed)} checkpoints?", abort=True)
        failed = pruned.carry_out()
        if not as_json:
            click.echo(f"deleted {len(pruned.removed) - len(failed)}")
    if as_json:
        report = {
            "removed": [str(f.path) for f in pruned.removed if f.path not in failed],
            "failed": [str(p) for p in failed],
            "kept": [str(f.path) for f in pruned.kept],
            "freed_bytes": pruned.freed,
            "dry_run": dry_run,
        }
        click.echo(json.dumps(report, indent=2))
    if failed:
        raise ConfigError(f"{len(failed)} checkpoints could not be deleted; the log says why")


@checkpoint.command("export")
@click.argument("source", callback=_here, metavar="CHECKPOINT")
@click.argument("out", callback=_here)
@click.option(
    "--weights",
    type=click.Choice(["evaluated", "raw", "ema"]),
    default="evaluated",
    show_default=True,
    help="Those that validation used, those that the optimizer trains, or their moving average.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["pt", "safetensors"]),
    help="Without it, what the ending of OUT says: .safetensors, or else pt.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
def export_command(
    source: Path,
    out: Path,
    weights: Literal["evaluated", "raw", "ema"],
    kind: Literal["pt", "safetensors"] | None,
    force: bool,
) -> None:
    """Write the weights of CHECKPOINT, and nothing else of it, to the file OUT.

    The checkpoint is verified before it is read, and no code of it is run.
    """
    from nshtrainer_checkpoint.export import export

    exported = export(source, out, weights=weights, kind=kind, replace=force)
    click.echo(
        f"wrote {out}: {exported.tensors} tensors, {size_text(exported.size)}, "
        f"{exported.what} of step {exported.step}",
        err=True,
    )


def _listing(found: list[Found]) -> list[str]:
    lines: list[str] = []
    for group in dict.fromkeys(f.group for f in found):
        mine = [f for f in found if f.group == group]
        lines += [f"run {mine[0].run}  {group}", *table(rows_of(mine)), ""]
    size = sum(f.size for f in found)
    return [*lines, f"{len(found)} checkpoints, {size_text(size)}"]


def _preview(pruned: Pruned) -> list[str]:
    lines: list[str] = []
    for title, some in (("to be deleted", pruned.removed), ("to be kept", pruned.kept)):
        lines.append(f"{title}: {len(some)}")
        lines += table(rows_of(some)) if some else []
        lines.append("")
    return [*lines, f"frees {size_text(pruned.freed)}"]


def _as_json(found: Found) -> dict[str, Any]:
    record = found.record
    return {
        "path": str(found.path),
        "run": found.run,
        "state": found.state,
        "why": found.why,
        "size_bytes": found.size,
        "age_seconds": ages([found])[0],
        "links": list(found.links),
        "callback": None if record is None else record.callback,
        "step": None if record is None else record.step,
        "epoch": None if record is None else record.epoch,
        "metadata": found.metadata,
    }


def _verdict(checked: Checked) -> dict[str, Any]:
    return {
        "path": str(checked.found.path),
        "verdict": checked.verdict,
        "why": checked.why,
        "good_one_before": None if checked.before is None else str(checked.before.path),
    }
