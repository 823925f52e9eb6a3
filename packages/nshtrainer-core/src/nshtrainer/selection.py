"""Choosing parameters, buffers and modules by globs over their names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nshtrainer.errors import ConfigError

__all__ = ["NameSelection"]


@dataclass(frozen=True)
class NameSelection:
    """Names that match one of *include* (None is all) and none of *exclude*; case-sensitive globs.

    Attributes:
        include: Globs, or None.
        exclude: Globs.
        owner: The callback's name, for messages.
        what: What the names are of, for messages.
    """

    include: Collection[str] | None
    exclude: Collection[str]
    owner: str
    what: str = "parameter"

    def __contains__(self, name: str) -> bool:
        taken = self.include is None or any(fnmatchcase(name, glob) for glob in self.include)
        return taken and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def check(self, names: Collection[str]) -> None:
        """Refuse globs that match nothing: they are written with some name in mind.

        Raises:
            ConfigError: One of them is none of *names*, or together they leave nothing.
        """
        for option, globs in (("include", self.include or ()), ("exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    some = ", ".join(sorted(names)[:5])
                    raise ConfigError(
                        f"{self.owner}: `{option}` has {glob!r}, which matches no {self.what} of the "
                        f"module; names there are {some}{', ...' if len(names) > 5 else ''}"
                    )
        if names and not any(name in self for name in names):
            raise ConfigError(
                f"{self.owner}: `include` and `exclude` leave no {self.what} of the module"
            )
