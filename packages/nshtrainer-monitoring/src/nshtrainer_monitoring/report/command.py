"""`nshtrainer report`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nshtrainer.cli.output import write_result

from .places import NoRunError, find_run, nearest_logs

if TYPE_CHECKING:
    from .terminal import Style

__all__ = ["report"]

_MOST = 8  # as many colours can be told apart


def _here(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[Path, ...]:
    """Paths of this machine; what lies in a store has to be fetched first."""
    for value in values:
        if "://" in value:
            raise click.BadParameter(
                f"{value} is a URL; a report is made from files of this machine. Fetch the run with "
                "the store's own tool first.",
                ctx,
                param,
            )
    return tuple(Path(value).expanduser() for value in values)


@click.command()
@click.argument("paths", nargs=-1, callback=_here, metavar="[RUN_DIR]")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The page to write; without it, report.html in the run's folder (compare.html with --compare).",
)
@click.option(
    "--terminal",
    is_flag=True,
    help="Draw the main curves as text; the page is then written only with --output.",
)
@click.option(
    "--compare",
    multiple=True,
    callback=_here,
    metavar="RUN_DIR ...",
    help="Lay further runs over the first, and show what differs in their configurations.",
)
def report(
    paths: tuple[Path, ...], output: Path | None, terminal: bool, compare: tuple[Path, ...]
) -> None:
    """Write a page about a run: curves, norms, checkpoints, configuration, environment.

    RUN_DIR is a run, or a folder of runs, whose newest is taken; without it, the newest run of the
    nearest nshtrainer_logs. The page is one file that loads nothing, and is made from the run's own
    files while it trains or after.
    """
    if len(paths) > 1 and not compare:
        raise click.UsageError(
            f"{len(paths)} folders were given; a report is about one run. To lay them over one "
            f"another: nshtrainer report {paths[0]} --compare {' '.join(map(str, paths[1:]))}"
        )
    roots = _roots(paths[:1], [*compare, *paths[1:]])
    from .run import read_run, tell_apart

    runs = [read_run(root) for root in roots]
    tell_apart(runs)
    if terminal:
        from .terminal import draw

        click.echo(draw(runs, _style()), nl=False)
    if output is not None or not terminal:
        from .page import page

        name = "report.html" if len(runs) == 1 else "compare.html"
        write_result(page(runs), roots[0] / name if output is None else output)


def _roots(first: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """The runs that are meant; which one was taken out of several is said on stderr."""
    roots: list[Path] = []
    try:
        for path in [*(first or [nearest_logs()]), *others]:
            root, of = find_run(path)
            if of > 1 or not first:
                runs = "one run" if of == 1 else f"{of} runs"
                click.echo(f"{path} has {runs}; the newest is {root.name}", err=True)
            roots.append(root)
    except NoRunError as error:
        raise click.BadParameter(str(error), param_hint="RUN_DIR") from error
    real = [os.path.realpath(root) for root in roots]
    twice = next((r for i, r in enumerate(real) if r in real[:i]), None)
    if twice is not None:
        raise click.UsageError(
            f"the run {twice} was given twice; name the folders of different runs"
        )
    if len(roots) > _MOST:
        raise click.UsageError(f"{len(roots)} runs were given; compare at most {_MOST} at a time")
    return roots


def _style() -> Style:
    from .terminal import Style

    stream = sys.stdout
    return Style(
        width=min(max(shutil.get_terminal_size((80, 24)).columns, 40), 160),
        encoding=getattr(stream, "encoding", None) or "ascii",
        color=stream.isatty() and not os.environ.get("NO_COLOR"),
    )
