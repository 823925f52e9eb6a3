"""Which norms are wanted of one quantity, and of which parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nshtrainer.errors import ConfigError

from .config import NormLoggingCallbackConfig

__all__ = ["Selection", "Wanted", "single_norms", "total_norms"]


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


@dataclass(frozen=True)
class Selection:
    """Names that match one of *include* (None is all) and none of *exclude*; globs."""

    include: Collection[str] | None
    exclude: Collection[str]

    def __contains__(self, name: str) -> bool:
        taken = self.include is None or any(fnmatchcase(name, glob) for glob in self.include)
        return taken and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def check(self, names: Collection[str]) -> None:
        """Refuse globs that match nothing: they are written with some parameter in mind.

        Raises:
            ConfigError: One of them matches none of *names*.
        """
        for option, globs in (("include", self.include or ()), ("exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    some = ", ".join(sorted(names)[:5])
                    raise ConfigError(
                        f"norm_logging: `{option}` has {glob!r}, which matches no parameter of the "
                        f"module; names there are {some}{', ...' if len(names) > 5 else ''}"
                    )


def _norm_type(option: bool | float) -> float | None:
    """The p of an option of the config; None if it is off."""
    if option is False:
        return None
    return 2.0 if option is True else float(option)
