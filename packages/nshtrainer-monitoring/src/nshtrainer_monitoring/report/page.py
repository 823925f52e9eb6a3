"""The page: everything about one run, or several runs laid over one another."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from .arranging import Arrangement, arrange
from .curves import figures, folded
from .markup import esc, section
from .run import RunData
from .sections import (
    checkpoint_section,
    comparison_section,
    config_section,
    environment_section,
    head_of,
    head_of_comparison,
    notes_of,
    summary_table,
)
from .timing import split_of_a_step

__all__ = ["page"]


def page(runs: Sequence[RunData]) -> str:
    """Return the page of *runs*, whole: it loads nothing, and is read without its script."""
    names = {name for run in runs for name in run.metrics.series}
    primary = next((run.primary[0] for run in runs if run.primary), None)
    plots = arrange(names, primary)
    parts = _of_metrics(plots, runs)
    if len(runs) == 1:
        run = runs[0]
        head, title = head_of(run), run.title
        parts += [
            ("values", "Values", summary_table(run)),
            ("checkpoints", "Checkpoints", checkpoint_section(run)),
            ("configuration", "Configuration", config_section(run)),
            ("environment", "Environment", environment_section(run)),
        ]
    else:
        head, title = head_of_comparison(runs), " / ".join(run.label for run in runs)
        parts.insert(0, ("differences", "What differs", comparison_section(runs)))
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{anchor}">{esc(name)}</a>' for anchor, name, _ in parts)
    body = "\n".join(section(*part) for part in parts)
    return _frame(title, f"<header>{head}{notes_of(runs)}</header>", links, body)


def _of_metrics(plots: Arrangement, runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    times = figures(plots.times, runs)
    if len(runs) == 1:
        times = split_of_a_step(runs[0]) + times
    return [
        ("curves", "Curves", figures(plots.main, runs, mark_best=True)),
        ("norms", "Norms", figures(plots.norms, runs)),
        ("rates", "Learning rate", figures(plots.rates, runs)),
        ("skips", "Skipped steps", figures(plots.skips, runs)),
        ("times", "Time", times),
        ("more", "More metrics", folded(plots.groups, runs)),
    ]


def _frame(title: str, header: str, links: str, body: str) -> str:
    here = files(__package__ or "nshtrainer_monitoring.report")
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    # Even if something of a run's text were taken for HTML, it could load and run nothing.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)} - nshtrainer report</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{header}
<nav aria-label="Parts of the report"><div>{links}</div></nav>
<main>
{body}
</main>
<footer>Made by <code>nshtrainer report</code> from the files of the run; nothing is loaded from a network.</footer>
<script>{script}</script>
</body>
</html>
"""
