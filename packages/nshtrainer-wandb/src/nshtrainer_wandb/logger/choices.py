"""What the W&B logger decides before it opens a run: mode and project. No wandb is imported."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from nshtrainer.errors import ConfigError

__all__ = ["check_tags", "choose_mode", "choose_project", "has_credentials"]

_FORBIDDEN: Final = re.compile(r"[/\\#?%:]")
_MAX_PROJECT: Final = 128
_MAX_TAG: Final = 64


def choose_mode(
    offline: bool | None,
    *,
    wandb_mode: str | None,
    has_key: bool,
) -> str:
    """Return the `mode` for `wandb.init`.

    Args:
        offline: What the configuration says; None leaves it to the others.
        wandb_mode: What `WANDB_MODE` or `wandb offline` say, if they say anything.
        has_key: Whether W&B could log in without asking.
    """
    if wandb_mode == "disabled":
        return "disabled"  # somebody has switched W&B off as a whole
    if offline is not None:
        return "offline" if offline else "online"
    if wandb_mode:
        return wandb_mode
    return "online" if has_key else "offline"


def choose_project(configured: str | None, of_trainer: str | None, root: Path) -> str:
    """Return the W&B project: the logger's, else the trainer's, else the name of the folder *root*.

    Raises:
        ConfigError: A configured name is not one that W&B takes.
    """
    if (named := configured or of_trainer) is None:
        name = _FORBIDDEN.sub("-", root.resolve().name)[:_MAX_PROJECT]
        return name or "nshtrainer"
    if _FORBIDDEN.search(named) or len(named) > _MAX_PROJECT:
        raise ConfigError(
            f"the W&B project cannot be named {named!r}; at most {_MAX_PROJECT} characters without "
            "/ \\ # ? % : are expected. Set `project` of the logger or of the trainer's config."
        )
    return named


def check_tags(tags: list[str]) -> tuple[str, ...] | None:
    """Return *tags* as W&B takes them; None if there are none.

    Raises:
        ConfigError: One is empty or has over 64 characters.
    """
    if bad := [tag for tag in tags if not 1 <= len(tag) <= _MAX_TAG]:
        raise ConfigError(
            f"W&B takes no tag of {len(bad[0])} characters ({bad[0][:80]!r}); 1 to {_MAX_TAG} are "
            "expected. Shorten it in the trainer's `tags`, or move it to `notes`."
        )
    return tuple(tags) or None


def has_credentials(base_url: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment or the netrc file holds a key for the W&B server at *base_url*."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).hostname or base_url
    named = environ.get("NETRC")
    home = Path(environ.get("HOME") or Path.home())
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            if (entry := netrc.netrc(path).hosts.get(host)) and entry[2]:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
