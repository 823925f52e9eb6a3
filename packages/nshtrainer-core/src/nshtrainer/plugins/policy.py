"""Which plugins may be used: environment variables and the config's `plugins`, acting before import.

A name in a switch is a distribution (`nshtrainer-ema`) or an entry point (`ema`); case, `-`, `_`
and `.` make no difference. Deny beats allow, and nshtrainer-core cannot be switched off.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from nshtrainer.config import Config
from nshtrainer.spelling import nearest

from .catalogue import CORE

if TYPE_CHECKING:
    from .manifest import Entry

__all__ = [
    "PluginsConfig",
    "Policy",
    "active_policy",
    "is_strict",
    "misdirected",
    "using_policy",
]

DISABLE = "NSHTRAINER_DISABLE_PLUGINS"
ALLOW = "NSHTRAINER_PLUGINS"
PREFER = "NSHTRAINER_PREFER"
STRICT = "NSHTRAINER_PLUGINS_STRICT"


def normalized(name: str) -> str:
    """The name under which distributions and entry points are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


class PluginsConfig(Config):
    """Which installed plugins this run may use; joined with the environment's switches."""

    allow: list[str] | None = None
    """If set, only these distributions or entry points (and nshtrainer-core) may be used."""

    disable: list[str] = Field(default_factory=list[str])
    """Distributions or entry points that must not be used; `*` is all. Beats `allow`."""

    prefer: dict[str, str] = Field(default_factory=dict[str, str])
    """For a name that several distributions provide: the distribution to take it from."""

    require: list[str] = Field(default_factory=list[str])
    """Requirements such as `acme-callbacks>=1.2` that must be installed, else the config is invalid."""

    defaults: list[str] = Field(default_factory=list[str])
    """Distributions whose `nshtrainer_default_callbacks` may add callbacks to this run."""

    @field_validator("require")
    @classmethod
    def _is_installed(cls, value: list[str]) -> list[str]:
        if value:
            from .requirements import check_requirement

            for requirement in value:
                check_requirement(requirement)
        return value

    @field_validator("prefer")
    @classmethod
    def _is_provided(cls, value: dict[str, str]) -> dict[str, str]:
        if value:
            from .manifest import manifest

            for problem in misdirected(value, manifest().providers):
                # Level 1: a config is validated several times, and is warned of once.
                warnings.warn(f"`plugins.prefer` {problem}", stacklevel=1)
        return value

    @field_validator("defaults")
    @classmethod
    def _has_hooks(cls, value: list[str]) -> list[str]:
        if value:
            from .hooks import plugin_manager

            known = {normalized(dist): dist for dist in plugin_manager.distributions()}
            for dist in value:
                if normalized(dist) not in known:
                    close = nearest(normalized(dist), known)
                    hint = f"; did you mean {known[close]!r}?" if close else ""
                    warnings.warn(
                        f"`plugins.defaults` names {dist!r}, which is no installed distribution "
                        f"with hooks{hint}",
                        stacklevel=1,
                    )
        return value


class Policy:
    """Decides whether an entry may be used; immutable."""

    def __init__(
        self,
        *,
        allow: Iterable[str] | None,
        disable: Iterable[str],
        prefer: dict[str, str],
        source: str,
    ) -> None:
        self.allow = None if allow is None else frozenset(map(normalized, allow))
        self.disable = frozenset(n.strip() if n.strip() == "*" else normalized(n) for n in disable)
        self.prefer = {normalized(k): normalized(v) for k, v in prefer.items()}
        self.source = source

    @property
    def is_open(self) -> bool:
        """Whether this policy changes nothing."""
        return self.allow is None and not self.disable and not self.prefer

    def disabled_by(self, entry: Entry) -> str | None:
        """What switches *entry* off, in words; None if nothing does."""
        if entry.dist == CORE:
            return None
        names = {normalized(entry.dist), normalized(entry.name)}
        if "*" in self.disable or names & self.disable:
            return f"{self.source} (disable)"
        if self.allow is not None and not names & self.allow:
            return f"{self.source} (allow)"
        return None

    def unknown_names(self, known: Iterable[str]) -> list[tuple[str, str | None]]:
        """Names in the switches that fit nothing in *known*, each with the nearest one."""
        all_known = sorted({normalized(k) for k in known} | {CORE})
        used = (self.disable | (self.allow or frozenset())) - {"*"}
        return [(n, nearest(n, all_known)) for n in sorted(used - set(all_known))]


def misdirected(
    prefer: Mapping[str, str], providers: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """What is the matter with the pairs of a `prefer` switch, in words that follow its name.

    Args:
        prefer: Name -> the distribution to take it from.
        providers: Name -> the distributions that provide it.
    """
    known = {normalized(name): (name, dists) for name, dists in providers.items()}
    for name, dist in prefer.items():
        if not (name.strip() and dist.strip()):
            text = name.strip() or f"={dist}"
            yield f"has {text!r}, which is no pair; write NAME=DISTRIBUTION"
        elif normalized(name) not in known:
            close = nearest(normalized(name), known)
            hint = f"; did you mean {known[close][0]!r}?" if close else ""
            yield f"names {name!r}, which no installed plugin provides{hint}"
        elif normalized(dist) not in map(normalized, dists := known[normalized(name)][1]):
            yield (
                f"takes {name!r} from {dist!r}, which does not provide it; "
                f"{' and '.join(sorted(dists))} does"
            )


def _split(value: str) -> list[str]:
    return [part for part in (p.strip() for p in value.split(",")) if part]


@functools.lru_cache(maxsize=8)
def _environment_policy(allow: str | None, disable: str, prefer: str) -> Policy:
    pairs = (p.partition("=") for p in _split(prefer))
    return Policy(
        allow=None if allow is None else _split(allow),
        disable=_split(disable),
        prefer={k: v for k, _, v in pairs},
        source="the environment",
    )


def environment_policy() -> Policy:
    """The policy that the environment variables state now."""
    env = os.environ
    return _environment_policy(env.get(ALLOW), env.get(DISABLE, ""), env.get(PREFER, ""))


def is_strict() -> bool:
    """Whether `NSHTRAINER_PLUGINS_STRICT` asks that a failing plugin is an error."""
    return os.environ.get(STRICT, "").strip().lower() not in {"", "0", "false", "no", "off"}


_config_policy: ContextVar[Policy | None] = ContextVar("nshtrainer_config_policy", default=None)


def active_policy() -> tuple[Policy, ...]:
    """The policies in force: the environment's and, while one is validated or used, the config's."""
    config, env = _config_policy.get(), environment_policy()
    both = (env,) if config is None else (env, config)
    return tuple(p for p in both if not p.is_open)


@contextlib.contextmanager
def using_policy(config: PluginsConfig | None) -> Generator[None]:
    """Let a config's `plugins` act on every look-up inside the block."""
    if config is None:
        yield
        return
    token = _config_policy.set(
        Policy(
            allow=config.allow,
            disable=config.disable,
            prefer=config.prefer,
            source="the config's `plugins`",
        )
    )
    try:
        yield
    finally:
        _config_policy.reset(token)
