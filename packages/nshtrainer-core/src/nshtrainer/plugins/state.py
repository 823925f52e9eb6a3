"""What can be the matter with a plugin, and one place that puts it into words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

__all__ = ["PluginState", "StateKind"]

StateKind = Literal[
    "available", "loaded", "disabled", "clash", "broken", "unavailable", "incompatible"
]


@dataclass(frozen=True)
class PluginState:
    """The state of one entry of the manifest.

    Attributes:
        kind: `available` (never used yet), `loaded`, `disabled` (switched off), `clash` (its name
            is provided twice), `broken` (it failed), `unavailable` (it says that it is of no use
            here) or `incompatible` (it asks for another nshtrainer-core).
        what: One sentence without a full stop: what happened, and where.
        remedy: What to do about it, or "".
        stage: Where a broken one failed: `name`, `import`, `attribute`, `type`, `hooks`, `call`.
        error: The exception of a broken one.
    """

    kind: StateKind
    what: str = ""
    remedy: str = ""
    stage: str = ""
    error: BaseException | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the plugin may be used."""
        return self.kind in {"available", "loaded"}

    @override
    def __str__(self) -> str:
        return "; ".join(part for part in (self.what, self.remedy) if part) or self.kind
