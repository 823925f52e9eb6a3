"""Which metrics share a plot, and in which section it stands, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Arrangement", "Line", "Panel", "arrange", "split_stage"]

MAX_LINES: Final = 8
"""In one plot; there are as many colours."""
_MAX_MAIN: Final = 12

_STAGES: Final = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip
_WORDS = "train|training|val|valid|validation|test"
_BEFORE = re.compile(rf"((?:ema|raw)/)?({_WORDS})[/_.\- ](.+)", re.IGNORECASE)
_BEHIND = re.compile(rf"(.+?)[/_.\- ]({_WORDS})", re.IGNORECASE)
_KIND = re.compile(r"(.+?)_(step|epoch)")
_LOADER = re.compile(r"(.+?)/dataloader_idx_(\d+)")

_PROGRESS: Final = ("epoch", "computed_epoch")
_RATE = re.compile(r"lr|(?:lr|learning_rate)[-/_ ].*|learning_rate|.*[/_](?:lr|learning_rate)")
_RATE_PART = re.compile(r"(momentum|weight_decay|betas?)")
_SKIPS = re.compile(r".*(?:skipped|clipped_steps|clipped_fraction|nonfinite|none_grads).*")
_TIMES = re.compile(
    r"(?:.*/)?time/.*|.*(?:^|[/_])(?:time|duration|eta)(?:_m?s)?|.*(?:_per_s(?:ec(?:ond)?)?|throughput)(?:/.*)?"
)
_NORMS = re.compile(
    r"(?:.*/)?((?:grad|param|update|weight|moment|exp_avg|clip)[^/]*?(?:norm|ratio|coef)[^/]*)(/.+)?"
)
_SUBJECT = re.compile(r"grad|param|update|weight|moment|exp_avg|clip")
_SUBJECTS: Final = {
    "grad": "gradient norm", "param": "parameter norm", "update": "update norm",
    "weight": "weight norm", "moment": "moment norm", "exp_avg": "moment norm",
    "clip": "clip coefficient",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One metric in a plot."""

    metric: str
    label: str
    stage: str = ""
    """`train`, `val`, `test`, or "" where the name does not tell."""


@dataclass
class Panel:
    """One plot."""

    title: str
    lines: list[Line] = field(default_factory=list[Line])


@dataclass
class Arrangement:
    """All plots of a run, by section."""

    main: list[Panel] = field(default_factory=list[Panel])
    norms: list[Panel] = field(default_factory=list[Panel])
    rates: list[Panel] = field(default_factory=list[Panel])
    skips: list[Panel] = field(default_factory=list[Panel])
    times: list[Panel] = field(default_factory=list[Panel])
    groups: dict[str, list[Panel]] = field(default_factory=dict[str, list[Panel]])
    """What is folded away: group -> plots."""


def split_stage(name: str) -> tuple[str, str, str]:
    """Split *name* into what is measured, the stage (`train`, `val`, `test` or ""), and a label.

    `val/loss`, `val_loss` and `loss_val` all measure `loss`.
    """
    plain, extra = name, ""
    if found := _LOADER.fullmatch(plain):
        plain, extra = found[1], f" {found[2]}"
    which, stage, base = "", "", plain
    if found := _BEFORE.fullmatch(plain):
        which, stage, base = (found[1] or "").rstrip("/"), _STAGES[found[2].lower()], found[3]
    elif found := _BEHIND.fullmatch(plain):
        base, stage = found[1], _STAGES[found[2].lower()]
    if found := _KIND.fullmatch(base):
        base, extra = found[1], f" ({found[2]}){extra}"
    label = " ".join(part for part in (which, stage) if part) or base
    return base, stage, label + extra


def arrange(names: Iterable[str], primary: str | None = None) -> Arrangement:
    """Assign every metric to a plot.

    Args:
        names: Of all metrics.
        primary: The metric that comes first.
    """
    result = Arrangement()
    panels: dict[str, dict[str, Panel]] = {}
    for name in sorted(names):
        section, title, line = _place(name)
        panel = panels.setdefault(section, {}).setdefault(title, Panel(title))
        panel.lines.append(line)
    main = list(panels.pop("main", {}).values())
    main.sort(key=lambda p: _rank(p, primary))
    result.main = _split(main[:_MAX_MAIN])
    if len(main) > _MAX_MAIN:
        result.groups["more metrics"] = _split(main[_MAX_MAIN:])
    for section in ("norms", "rates", "skips", "times"):
        setattr(result, section, _split(panels.pop(section, {}).values()))
    for group in sorted(panels):
        result.groups[group] = _split(panels[group].values())
    return result


def _place(name: str) -> tuple[str, str, Line]:
    """The section or group, the plot in it, and the line."""
    base, stage, label = split_stage(name)
    if name in _PROGRESS:
        return "progress", name, Line(name, name)
    if _RATE.fullmatch(base):
        part = _RATE_PART.search(base)
        return "rates", part[1].replace("_", " ") if part else "learning rate", Line(name, base)
    if _SKIPS.fullmatch(base):
        return "skips", base.removeprefix("grad_").replace("_", " "), Line(name, base)
    if _TIMES.fullmatch(base):
        short = base.removesuffix("_s").removesuffix("_time").removeprefix("time/")
        of_stage = f"{stage} {short}".strip() if "epoch" in base else short
        return "times", _time_title(base), Line(name, of_stage)
    if stage in ("train", "") and (found := _NORMS.fullmatch(base)):
        return _place_norm(name, base, found)
    if stage == "" and "/" in base:
        return base.partition("/")[0], name, Line(name, name)
    if "/" in base:
        return base.partition("/")[0], base, Line(name, label, stage)
    return "main", base, Line(name, label, stage)


def _place_norm(name: str, base: str, found: re.Match[str]) -> tuple[str, str, Line]:
    whole, of = found[1], found[2]
    if of is not None:
        return base[: found.end(1)], of[1:], Line(name, of[1:])
    subject = _SUBJECT.match(whole)
    is_share = "ratio" in whole or "coef" in whole  # of another size than norms
    title = whole.replace("_", " ") if subject is None or is_share else _SUBJECTS[subject[0]]
    return "norms", title, Line(name, base)


def _time_title(base: str) -> str:
    if re.search(r"per_s|throughput", base):
        return base.replace("_", " ")
    if re.search(r"(?:^|[/_])eta", base):
        return "remaining time"
    return "time of an epoch" if "epoch" in base else "time of a step"


def _rank(panel: Panel, primary: str | None) -> tuple[bool, bool, bool, str]:
    stages = {line.stage for line in panel.lines}
    return (
        all(line.metric != primary for line in panel.lines),
        "loss" not in panel.title.lower(),
        len(stages) < 2,
        panel.title,
    )


def _split(panels: Iterable[Panel]) -> list[Panel]:
    """*panels*, those with more lines than colours cut into several."""
    result: list[Panel] = []
    order = {"train": 0, "val": 1, "test": 2}
    for panel in panels:
        lines = sorted(panel.lines, key=lambda line: order.get(line.stage, 3))
        starts = range(0, len(lines), MAX_LINES)
        result += [Panel(panel.title, lines[i : i + MAX_LINES]) for i in starts]
    return result
