"""Where the time of a training step goes, as far as metrics such as `train/forward_time_s` tell."""

from __future__ import annotations

import re
import statistics
from typing import Final

from .axes import number
from .markup import esc
from .run import RunData

__all__ = ["parts_of_a_step", "split_of_a_step"]

_PART = re.compile(r"train/([^/]+)_time_m?s|(?:train/)?time/(?:train/)?([^/]+?)(?:_m?s)?")
_NO_PART = re.compile(
    r"total|^step$|^batch$|epoch|eta|per_|throughput|elapsed|fraction|remaining|^training$"
)
_WIDTH: Final = 1000


def parts_of_a_step(run: RunData) -> dict[str, float]:
    """Part of a step -> its median time, the longest first."""
    found: dict[str, float] = {}
    for name, series in run.metrics.series.items():
        match = _PART.fullmatch(name)
        part = (match[1] or match[2]) if match else ""
        values = [y for _, y in series.finite]
        if part and values and not _NO_PART.search(part):
            found[part.replace("_", " ")] = max(statistics.median(values), 0.0)
    return dict(sorted(found.items(), key=lambda item: -item[1])[:8])


def split_of_a_step(run: RunData) -> str:
    """A bar with the share of each part; "" if fewer than two were measured."""
    parts = parts_of_a_step(run)
    whole = sum(parts.values())
    if len(parts) < 2 or whole <= 0:
        return ""
    bars: list[str] = []
    keys: list[str] = []
    left = 0.0
    for color, (name, value) in enumerate(parts.items()):
        width = _WIDTH * value / whole
        text = f"{name} {value / whole:.1%}"
        bars.append(
            f'<rect class="f{color}" x="{left:.1f}" width="{width:.1f}" height="26">'
            f"<title>{esc(text)}</title></rect>"
        )
        keys.append(
            f'<span class="key"><i class="k{color}"></i>{esc(name)} '
            f"<b>{value / whole:.1%}</b> ({number(value, 3)})</span>"
        )
        left += width
    return (
        '<div class="card split"><h3>Where a step goes <span class="muted">(medians of the logged steps)'
        f'</span></h3><svg viewBox="0 0 {_WIDTH} 26" preserveAspectRatio="none" role="img" '
        f'aria-label="{esc(", ".join(f"{n} {v / whole:.0%}" for n, v in parts.items()))}">{"".join(bars)}</svg>'
        f'<span class="legend">{"".join(keys)}</span></div>'
    )
