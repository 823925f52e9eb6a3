"""From panels of metrics to plots: of one run, or the same metric of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .arranging import Line, Panel
from .axes import DECADES, number
from .markup import details
from .plot import LARGE, SMALL, Curve, Mark, Size, figure
from .run import RunData

__all__ = ["figures", "folded", "steps_of"]

_STAGE_COLORS = {"train": 0, "val": 1, "test": 2}
_STAGE_STYLES = {"train": "thin", "val": "thick", "test": "dashed"}
_MANY = 300
"""Of a group of metrics no more are drawn."""


def figures(panels: Iterable[Panel], runs: Sequence[RunData], *, mark_best: bool = False) -> str:
    """The plots of *panels*; "" if there is none.

    Args:
        panels: What to show.
        runs: One, or several whose curves are laid over one another.
        mark_best: Show where the best checkpoint was saved, in the plot of what it ranks by.
    """
    shown = [text for panel in panels for text in _drawn(panel, runs, LARGE, mark_best=mark_best)]
    return f'<div class="plots">{"".join(shown)}</div>' if shown else ""


def folded(groups: Mapping[str, Sequence[Panel]], runs: Sequence[RunData]) -> str:
    """The plots of groups of metrics, small, and folded away."""
    parts: list[str] = []
    for group, panels in groups.items():
        shown = [text for panel in panels[:_MANY] for text in _drawn(panel, runs, SMALL)]
        note = f"{len(panels)} plots" if len(panels) > 1 else "1 plot"
        if len(panels) > _MANY:
            note += f", the first {_MANY} are shown"
        parts.append(details(group, f'<div class="plots many">{"".join(shown)}</div>', note=note))
    return "\n".join(parts)


def _drawn(
    panel: Panel, runs: Sequence[RunData], size: Size, *, mark_best: bool = False
) -> list[str]:
    if len(runs) > 1:
        return _compared(panel, runs, size)
    run = runs[0]
    colors = _colors(panel.lines)
    curves = [
        Curve(line.label, run.metrics.series[line.metric], color, _STAGE_STYLES.get(line.stage, ""))
        for line, color in zip(panel.lines, colors, strict=True)
    ]
    mark = _best(run, panel) if mark_best else None
    return [
        figure(
            panel.title, curves, size=size, mark=mark, decades=_decades(panel), steps=steps_of(runs)
        )
    ]


def _compared(panel: Panel, runs: Sequence[RunData], size: Size) -> list[str]:
    """A run has a colour; lines of one plot that are no stages of one metric get a plot each."""
    together = [line for line in panel.lines if line.stage]
    plots = [(panel.title, together)] if together else []
    plots += [(line.label, [line]) for line in panel.lines if not line.stage]
    shown: list[str] = []
    for title, lines in plots:
        curves = [
            Curve(
                f"{run.label} {line.label}" if len(lines) > 1 else run.label,
                run.metrics.series[line.metric],
                index,
                {"train": "dashed"}.get(line.stage, "") if len(lines) > 1 else "",
            )
            for index, run in enumerate(runs)
            for line in lines
            if line.metric in run.metrics.series
        ]
        if len(lines) == 1 and lines[0].stage:
            title = lines[0].metric  # noqa: PLW2901 -- only here the plot's name says too little
        shown.append(
            figure(title, curves, size=size, decades=_decades(panel), steps=steps_of(runs))
        )
    return shown


def steps_of(runs: Sequence[RunData]) -> tuple[float, float]:
    """The first and the last step of all plots: what happened at one time stands at one place."""
    series = [s for run in runs for s in run.metrics.series.values()]
    return min(s.xs[0] for s in series), max(s.xs[-1] for s in series)


def _decades(panel: Panel) -> float:
    """Norms have spikes, beside which all else would lie on the floor of a linear scale."""
    is_norm = all("norm" in line.metric for line in panel.lines)
    return 2 if is_norm else DECADES


def _colors(lines: Sequence[Line]) -> list[int]:
    """A colour for each line; that of its stage if it is free."""
    taken: list[int] = []
    for line in lines:
        wanted = _STAGE_COLORS.get(line.stage, 0)
        free = [c for c in (wanted, *range(8)) if c not in taken]
        taken.append(free[0])
    return taken


def _best(run: RunData, panel: Panel) -> Mark | None:
    names = {line.metric for line in panel.lines}
    for saved in run.checkpoints:
        if saved.is_best and saved.metric in names and saved.step is not None:
            # It counts the steps that were done; the loggers begin with step 0.
            return Mark(saved.step - 1, f"best {number(saved.value)}", saved.mode == "max")
    return None
