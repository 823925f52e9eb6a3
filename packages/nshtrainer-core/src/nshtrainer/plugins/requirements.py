"""Version requirements: what a config asks for, and what a plugin asks of the core."""

from __future__ import annotations

import importlib_metadata
from pydantic_core import PydanticCustomError

from .catalogue import CORE

__all__ = ["check_requirement", "unmet_core_requirement"]


def check_requirement(text: str) -> None:
    """Check that the installed distributions meet *text* (`dist>=1`).

    Raises:
        PydanticCustomError: *text* is no requirement, or it is not met.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        raise PydanticCustomError(
            "requirement",
            "{text} is no requirement; write `dist` or `dist>=1.2`",
            {"text": repr(text)},
        ) from None
    try:
        version = importlib_metadata.version(requirement.name)
    except importlib_metadata.PackageNotFoundError:
        raise PydanticCustomError(
            "plugin_not_installed",
            "this config requires {text}, which is not installed: pip install '{text}'",
            {"text": text},
        ) from None
    if not requirement.specifier.contains(version, prereleases=True):
        raise PydanticCustomError(
            "plugin_incompatible",
            "this config requires {text}, but {version} is installed: pip install '{text}'",
            {"text": text, "version": version},
        )


def unmet_core_requirement(distribution: importlib_metadata.Distribution | None) -> str | None:
    """The requirement on nshtrainer-core that *distribution* states and that ours does not meet."""
    if distribution is None:
        return None
    from packaging.requirements import InvalidRequirement, Requirement

    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.name.replace("_", "-").lower() == CORE and not requirement.marker:
            ours = importlib_metadata.version(CORE)
            if not requirement.specifier.contains(ours, prereleases=True):
                return f"{CORE}{requirement.specifier} (installed: {ours})"
    return None
