"""Which required metrics are missing, when that can be said, and how to say it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from nshtrainer.spelling import nearest

__all__ = ["describe_missing", "is_validation_metric", "nearest_metric"]

_VALIDATION = re.compile(r"(val|valid|validation)(?![a-z])", re.IGNORECASE)


def is_validation_metric(name: str) -> bool:
    """Whether *name* says that it is logged in validation: `val/loss`, `val_loss`, `valid.acc`.

    Any other name may be logged in training, hence is not expected after a validation alone.
    """
    return _VALIDATION.match(name) is not None


def nearest_metric(name: str, logged: Iterable[str]) -> str | None:
    """Return the logged name that *name* was probably meant to be."""
    plain = {_plain(other): other for other in logged}
    if (same := plain.get(_plain(name))) is not None:
        return same
    close = nearest(_plain(name), plain)
    return None if close is None else plain[close]


def describe_missing(
    missing: Mapping[str, str], checked: int, logged: Collection[str], *, when: str
) -> str:
    """Return what happened, what was expected, and what to do.

    Args:
        missing: Name of each missing metric, and who asks for it (and where it is missing).
        checked: How many metrics were looked for.
        logged: All names that were logged.
        when: The moment of the check, such as "after the sanity check".
    """
    lines = [
        f"{when}, {len(missing)} of {checked} required metrics had not been logged:",
    ]
    for name, source in missing.items():
        close = nearest_metric(name, logged)
        hint = f" (nearest logged: {close!r})" if close else ""
        lines.append(f"  {name!r}{hint}, required by {source}")
    lines.append(f"Logged: {', '.join(sorted(logged)) or 'nothing'}.")
    lines.append(
        "Log it with self.log(...) in your module, or correct the name where it is required."
    )
    return "\n".join(lines)


def _plain(name: str) -> str:
    """Without case and separators, in which most slips are made."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())
