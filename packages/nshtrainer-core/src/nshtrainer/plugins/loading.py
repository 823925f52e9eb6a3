"""Loading one entry point: import, look up, check, and undo what a failure left behind."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

from nshtrainer.errors import PluginLoadError, PluginUnavailable

from .manifest import Entry
from .policy import is_strict
from .state import PluginState

__all__ = ["is_loading", "load_object", "loading"]

log = logging.getLogger(__name__)
_loading: ContextVar[bool] = ContextVar("nshtrainer_loading", default=False)


def is_loading() -> bool:
    """Whether a plugin is being imported: its own registrations must not raise then."""
    return _loading.get()


@contextlib.contextmanager
def loading() -> Generator[None]:
    """Mark the block as the import of a plugin."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def load_object(entry: Entry) -> Any | PluginState:
    """Import what *entry* names; a failure is returned as its state (raised in strict mode).

    Raises:
        PluginLoadError: It failed and `NSHTRAINER_PLUGINS_STRICT` is set.
    """
    if not entry.has_valid_name:
        return failed(entry, "name", ValueError(f"{entry.name!r} is not made of a-z, 0-9 and _"))
    module_name, _, attribute = entry.target.partition(":")
    stage = "import"
    try:
        with loading():
            found: Any = importlib.import_module(module_name)
            stage = "attribute"
            for part in attribute.split(".") if attribute else ():
                found = getattr(
                    found, part
                )  # may import too: a module's `__getattr__` is the plugin's
    except PluginUnavailable as error:
        return PluginState(
            "unavailable",
            f"{entry.name!r} of {entry.dist} {entry.version} is not usable here: {error}",
            error=error,
        )
    except KeyboardInterrupt:
        raise  # the user's, not the plugin's
    except BaseException as error:  # noqa: BLE001 -- a plugin may raise anything; only its user is hurt
        return failed(entry, stage if isinstance(error, AttributeError) else "import", error)
    return found


def failed(entry: Entry, stage: str, error: BaseException) -> PluginState:
    """The state of an entry that failed at *stage*: incompatible if its requirement says so.

    Raises:
        PluginLoadError: `NSHTRAINER_PLUGINS_STRICT` is set.
    """
    from .requirements import unmet_core_requirement

    reason = f"{type(error).__name__}: {error}"
    what = f"{entry.name!r} of {entry.dist} {entry.version} ({entry.value}) "
    try:
        unmet = unmet_core_requirement(entry.distribution)
    except Exception:  # noqa: BLE001 -- unreadable requirements explain nothing
        unmet = None
    if unmet is not None:
        state = PluginState(
            "incompatible",
            f"{what}failed ({reason}) and was made for {unmet}",
            f"upgrade {entry.dist} or install the core that it asks for",
            stage,
            error,
        )
    else:
        state = PluginState(
            "broken", what + _STAGES[stage] + reason, _remedy(entry, stage), stage, error
        )
    log.debug("plugin %s failed at %s", entry, stage, exc_info=error)
    if is_strict():
        raise PluginLoadError(str(state)) from error
    return state


_STAGES = {
    "name": "has a name that configs cannot use: ",
    "import": "failed to import: ",
    "attribute": "names an object that its module does not have: ",
    "type": "does not give a usable class: ",
    "hooks": "has hooks that cannot be used: ",
    "call": "failed in a hook: ",
}


def _remedy(entry: Entry, stage: str) -> str:
    if stage == "attribute":
        return f"reinstall {entry.dist} (an editable install keeps old entry points)"
    return f"repair or uninstall {entry.dist}, or set NSHTRAINER_DISABLE_PLUGINS={entry.dist}"
