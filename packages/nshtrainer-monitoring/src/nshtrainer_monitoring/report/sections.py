"""The parts of the page that are no plots: head, tables of values, checkpoints, configuration, environment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from nshtrainer.config_files import dump_yaml
from nshtrainer.quantities import size_text
from nshtrainer.trainer.config import TrainerConfig

from .axes import number
from .checkpoints import Saved
from .markup import details, esc, facts, table
from .run import RunData
from .series import Series
from .settings import callbacks_of, changed, differences, flat, is_slot, value_text

__all__ = [
    "best_of",
    "checkpoint_section",
    "comparison_section",
    "config_section",
    "duration",
    "environment_section",
    "head_of",
    "head_of_comparison",
    "notes_of",
    "status_text",
    "summary_table",
]

_SHOWN_CHECKPOINTS = 12
_SHOWN_VALUES = 30
_SKIPPED = "train/grad_skipped_steps"


# ---- head --------------------------------------------------------------------------------------


def head_of(run: RunData) -> str:
    """Title, status and the numbers that are looked for first."""
    tiles = "".join(
        f"<div class=tile><dt>{esc(name)}</dt><dd>{esc(value)}"
        f"{f'<small>{esc(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in _tiles(run)
        if value
    )
    project = run.record.get("project")
    where = [f"run {run.id}", f"project {project}" if project else "", str(run.root)]
    return (
        f'<div class="title"><h1>{esc(run.title)}</h1>{_badge(run)}</div>'
        f'<p class="sub">{esc(" · ".join(part for part in where if part))}</p>'
        f'<dl class="tiles">{tiles}</dl>'
    )


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    series, config = run.metrics.series, run.config
    limit = config.get("max_epochs")
    best, primary = best_of(run), run.primary
    skipped = series.get(_SKIPPED)
    size = sum(s.size for s in run.checkpoints)
    count = len(run.checkpoints)
    written = datetime.fromtimestamp(run.written).astimezone() if run.written else None
    return [
        ("steps", _steps(run), _of(config.get("max_steps"))),
        ("epochs", _epochs(run), _of(limit)),
        (
            f"best {primary[0]}" if primary else "",
            number(best[1]) if best else "",
            f"at step {number(best[0])}" if best else "",
        ),
        ("trained for", duration(run.seconds), "as of the last checkpoint"),
        ("skipped steps", _last(skipped), ""),
        ("checkpoints", str(count) if count else "", size_text(size) if count else ""),
        ("last written", _when(written, "%H:%M"), _when(written, "%Y-%m-%d %Z")),
    ]


def _steps(run: RunData) -> str:
    """How many were made: rows count from 0, but those of an evaluation after the last step."""
    last = run.metrics.last_step
    if last is None:
        return ""
    is_after = max((s.step or 0 for s in run.checkpoints), default=0) == last
    return number(last if is_after else last + 1)


def _epochs(run: RunData) -> str:
    """How many were made; an evaluation of an earlier checkpoint tells a smaller number later."""
    series = run.metrics.series.get("computed_epoch") or run.metrics.series.get("epoch")
    known = [y for y in series.ys if math.isfinite(y)] if series else []
    return number(max(known)) if known else ""


def _of(limit: Any) -> str:
    return f"of {limit}" if type(limit) is int and limit > 0 else ""


def _last(series: Series | None) -> str:
    return number(series.ys[-1]) if series else ""


def _when(moment: datetime | None, form: str) -> str:
    return moment.strftime(form) if moment else ""


def status_text(run: RunData) -> str:
    """The status in words."""
    return {
        "silent": "running, but silent",
        "unknown": "status unknown",
    }.get(run.status, run.status)


def _badge(run: RunData) -> str:
    css = {"finished": "good", "running": "busy", "silent": "warn", "unknown": "warn"}
    return f'<span class="badge {css.get(run.status, "fault")}">{esc(status_text(run))}</span>'


def best_of(run: RunData) -> tuple[float, float] | None:
    """Step and value of the best primary metric."""
    name, mode = run.primary or ("", "")
    series = run.metrics.series.get(name)
    if series is None:
        return None
    return series.highest if mode == "max" else series.lowest


def notes_of(runs: Sequence[RunData]) -> str:
    """What is missing or damaged."""
    notes = [
        f"<li>{esc(f'{run.label}: {note}' if len(runs) > 1 else note)}</li>"
        for run in runs
        for note in run.notes
    ]
    return f'<ul class="notes">{"".join(notes)}</ul>' if notes else ""


# ---- values ------------------------------------------------------------------------------------


def summary_table(run: RunData) -> str:
    """The last, least and greatest value of every metric."""
    rows = [_values(name, series) for name, series in sorted(run.metrics.series.items())]
    head = ("metric", "last", "least", "at step", "greatest", "at step", "values", "not finite")
    columns = range(1, len(head))
    first = [row for row in rows if "/" not in row[0] or row[0].count("/") == 1][:_SHOWN_VALUES]
    if not rows:
        return ""
    if len(rows) <= _SHOWN_VALUES:
        return f'<div class="card">{table(head, rows, numbers=columns)}</div>'
    return f'<div class="card">{table(head, first, numbers=columns)}</div>' + details(
        "All metrics", table(head, rows, numbers=columns), note=str(len(rows))
    )


def _values(name: str, series: Series) -> tuple[str, ...]:
    least, most, last = series.lowest, series.highest, series.last
    bad = len(series.nonfinite)
    return (
        esc(name),
        esc(number(last[1]) if last else ""),
        esc(number(least[1]) if least else ""),
        esc(number(least[0]) if least else ""),
        esc(number(most[1]) if most else ""),
        esc(number(most[0]) if most else ""),
        number(series.count),
        f'<span class="pill fault">{number(bad)}</span>' if bad else "",
    )


# ---- checkpoints -------------------------------------------------------------------------------


def checkpoint_section(run: RunData) -> str:
    """The checkpoints, the newest first, and those that links lead to before all others."""
    if not run.checkpoints:
        return ""
    marked = [s for s in run.checkpoints if s.links]
    ordered = marked + [s for s in run.checkpoints if not s.links]
    first, rest = ordered[:_SHOWN_CHECKPOINTS], ordered[_SHOWN_CHECKPOINTS:]
    text = f'<div class="card">{_checkpoint_table(run, first)}</div>'
    if rest:
        text += details("Further checkpoints", _checkpoint_table(run, rest), note=str(len(rest)))
    return text


def _checkpoint_table(run: RunData, saved: Sequence[Saved]) -> str:
    head = ("step", "epoch", "metric", "value", "size", "trained for", "", "file")
    rows = [
        (
            number(s.step),
            number(s.epoch),
            esc(s.metric),
            esc(number(s.value)),
            size_text(s.size),
            esc(duration(s.seconds)),
            _pills(s),
            f"<code>{esc(_below(run, s))}</code>",
        )
        for s in saved
    ]
    return table(head, rows, numbers=(0, 1, 3, 4, 5))


def _pills(saved: Saved) -> str:
    texts = [("best", "good")] * saved.is_best + [("last", "")] * saved.is_last
    texts += [(saved.state, "fault")] if saved.state else []
    return "".join(f'<span class="pill {css}">{esc(text)}</span>' for text, css in texts)


def _below(run: RunData, saved: Saved) -> str:
    try:
        return saved.path.relative_to(run.root).as_posix()
    except ValueError:
        return str(saved.path)


# ---- configuration -----------------------------------------------------------------------------


def config_section(run: RunData) -> str:
    """Callbacks with their options, what else was set, plugins, and all of it as it was recorded."""
    plugins = table(("distribution", "version"), _pairs(run.plugins)) if run.plugins else ""
    left = _card("Callbacks", _callback_table(run))
    right = _card("Settings", _settings(run)) + _card("Plugins", plugins)
    columns = [f"<div>{column}</div>" for column in (left, right) if column]
    text = f'<div class="cards">{"".join(columns)}</div>' if columns else ""
    if run.config:
        whole = f"<pre>{esc(_as_yaml(run.config))}</pre>"
        text += details("All of it", whole, note=run.config_source)
    return text


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{esc(title)}</h3>{body}</div>' if body else ""


def _callback_table(run: RunData) -> str:
    rows = [
        (
            f"{esc(name)}{f'<br><span class=muted>{esc(slot)}</span>' if slot and slot != name else ''}",
            " ".join(
                f"<code>{esc(k)}={esc(value_text(v, 80))}</code>"
                for k, v in flat(options).items()
                if v is not None
            )
            or '<span class="muted">defaults</span>',
        )
        for slot, name, options in callbacks_of(run.config)
    ]
    if not rows:
        return ", ".join(f"<code>{esc(name)}</code>" for name in run.callbacks)
    return table(("name", "options"), rows)


def _settings(run: RunData) -> str:
    """What was set on the trainer, apart from callbacks and loggers."""
    shown: list[tuple[str, str]] = []
    for name, value in changed(run.config, TrainerConfig).items():
        if is_slot(value) or name in ("callbacks", "id"):
            continue
        if name == "loggers" and isinstance(value, list):
            names = [str(_name(item)) for item in cast("list[Any]", value)]
            shown.append((name, esc(", ".join(names))))
            continue
        shown += [
            (dotted, f"<code>{esc(value_text(v, 120))}</code>")
            for dotted, v in flat({name: value}).items()
            if v not in (None, "", [], {})
        ]
    return facts(shown)


def _name(item: Any) -> Any:
    return cast("Mapping[str, Any]", item).get("name", "") if isinstance(item, Mapping) else item


def _as_yaml(config: dict[str, Any]) -> str:
    try:
        return dump_yaml(config)
    except Exception:  # noqa: BLE001 -- of another program's file anything may be left; it is shown all the same
        return json.dumps(config, indent=2, default=str)


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(esc(name), f"<code>{esc(value)}</code>") for name, value in sorted(values.items())]


# ---- environment -------------------------------------------------------------------------------


def environment_section(run: RunData) -> str:
    """Machine, Python, git, scheduler and packages."""
    found = run.environment
    if not found:
        return ""
    packages = found.get("packages")
    parts = {k: v for k, v in found.items() if k != "packages" and v not in ({}, [], None)}
    shown = [(name.replace("_", " "), _fact(name, value)) for name, value in parts.items()]
    text = f'<div class="card">{facts(shown)}</div>'
    if isinstance(packages, Mapping) and packages:
        listed = cast("Mapping[str, Any]", packages)
        body = table(("package", "version"), _pairs(listed))
        text += details("Packages", body, note=str(len(listed)))
    return text


def _fact(name: str, value: Any) -> str:
    if name == "command_line" and isinstance(value, list):
        return f"<code>{esc(' '.join(map(str, cast('list[Any]', value))))}</code>"
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        texts = [
            f"{esc(k)} <b>{esc(_plain(k, v))}</b>" for k, v in items if v not in (None, [], "")
        ]
        return " · ".join(texts) or "none"
    return esc(value)


def _plain(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, (int, float)):
        return size_text(value)
    if isinstance(value, list):
        return ", ".join(map(str, cast("list[Any]", value)))
    return value if isinstance(value, str) else value_text(value)


# ---- several runs ------------------------------------------------------------------------------


def head_of_comparison(runs: Sequence[RunData]) -> str:
    """A row for each run."""
    head = ("run", "status", "steps", "epochs", "best", "at step", "trained for", "folder")
    rows: list[tuple[str, ...]] = []
    for index, run in enumerate(runs):
        best = best_of(run)
        name = f"{run.primary[0]} " if run.primary else ""
        rows.append(
            (
                f'<span class="key k{index % 8}"><i></i>{esc(run.label)}</span>',
                _badge(run),
                _steps(run),
                _epochs(run),
                f"{esc(name)}<b>{esc(number(best[1]))}</b>" if best else "",
                number(best[0]) if best else "",
                esc(duration(run.seconds)),
                f"<code>{esc(run.root)}</code>",
            )
        )
    return (
        f"<h1>{len(runs)} runs compared</h1>"
        f'<div class="card" style="margin-top:16px">{table(head, rows, numbers=(2, 3, 5, 6))}</div>'
    )


def comparison_section(runs: Sequence[RunData]) -> str:
    """What differs between the configurations, the plugins and the surroundings of *runs*."""
    titles = [run.label for run in runs]
    config = differences([run.config for run in runs])
    plugins = differences([run.plugins for run in runs])
    around = differences([_without_moments(run.environment) for run in runs])
    packages = {k: v for k, v in around.items() if k.startswith("packages.")}
    rest = {k: v for k, v in around.items() if k not in packages}
    cards = [
        _card("Configuration", _difference_table(titles, config)),
        _card("Plugins", _difference_table(titles, plugins) if plugins else ""),
        _card("Surroundings", _difference_table(titles, rest) if rest else ""),
    ]
    text = "".join(f'<div style="margin-bottom:12px">{card}</div>' for card in cards if card)
    if packages:
        short = {k.removeprefix("packages."): v for k, v in packages.items()}
        text += details("Packages", _difference_table(titles, short), note=str(len(packages)))
    return text


def _difference_table(titles: Sequence[str], found: Mapping[str, Sequence[str]]) -> str:
    if not found:
        return '<p class="muted">no difference</p>'
    rows = [
        (
            esc(name),
            *(f"<code>{esc(v)}</code>" if v else '<span class="muted">-</span>' for v in vs),
        )
        for name, vs in found.items()
    ]
    return table(("", *titles), rows)


def _without_moments(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in environment.items() if k != "time"}


# ---- units -------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """*seconds* for a person: `1 d 4 h`, `12 min`, `3.2 s`."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, "d"), (h, "h"), (m, "min"), (s, "s")]
    start = next(i for i, (value, _) in enumerate(parts) if value)
    return " ".join(f"{value} {unit}" for value, unit in parts[start : start + 2] if value)
