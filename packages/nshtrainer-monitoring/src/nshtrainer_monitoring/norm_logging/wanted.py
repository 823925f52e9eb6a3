"""Which norms are wanted of one quantity, and of which parameters."""

from __future__ import annotations

from dataclasses import dataclass

from .config import NormLoggingCallbackConfig

__all__ = ["Wanted", "single_norms", "total_norms"]


@dataclass(frozen=True)
class Wanted:
    """The p of each kind of norm of one quantity; None is not wanted."""

    total: float | None
    each: float | None
    module: float | None

    @classmethod
    def of(cls, config: NormLoggingCallbackConfig, option: str) -> Wanted:
        """What *config* says of the options `option`, `option_per_param` and `option_per_module`."""
        ways = ("", "_per_param", "_per_module")
        return cls(*(_norm_type(getattr(config, option + way)) for way in ways))

    def __bool__(self) -> bool:
        return (self.total, self.each, self.module) != (None, None, None)


def total_norms(*wanted: Wanted) -> tuple[float, ...]:
    """The norm types that are needed over all tensors together, each once."""
    return tuple(sorted({p for w in wanted for p in (w.total, w.each) if p is not None}))


def single_norms(*wanted: Wanted) -> tuple[float, ...]:
    """The norm types that are needed of each tensor, each once."""
    return tuple(sorted({p for w in wanted for p in (w.each, w.module) if p is not None}))


def _norm_type(option: bool | float) -> float | None:
    """The p of an option of the config; None if it is off."""
    if option is False:
        return None
    return 2.0 if option is True else float(option)
