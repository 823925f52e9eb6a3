"""What an examination finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

__all__ = ["Finding", "Status", "worst"]

Status = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at: `versions`, `metadata`, `names` ...
        status: `ok`, `warn` (it works, but not as it might be meant) or `fail`.
        what: What was found, with the values.
        why: What it leads to.
        do: What to do about it.
    """

    check: str
    status: Status
    what: str
    why: str = ""
    do: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as plain data."""
        return dataclasses.asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    """The most serious status of *findings*."""
    statuses = {finding.status for finding in findings}
    return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "ok"
