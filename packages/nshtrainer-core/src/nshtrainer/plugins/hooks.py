"""The plugin manager: pluggy checks and calls hooks; loading and isolation are ours.

Hook modules (entry-point group `nshtrainer.plugins`) are imported at the first hook call. pluggy's
own loader would let the first broken plugin end the loop, and its multi-call the first failing hook.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pluggy

from nshtrainer import hookspecs
from nshtrainer.errors import PluginContractError, PluginLoadError
from nshtrainer.spelling import nearest

from .loading import failed, load_object
from .manifest import HOOKS, Entry, manifest
from .policy import active_policy, is_strict, normalized
from .state import PluginState

__all__ = ["HookCall", "HookManager", "hookimpl", "plugin_manager"]

log = logging.getLogger(__name__)

hookimpl = pluggy.HookimplMarker("nshtrainer")
"""Marks a function as an implementation of the hook of the same name."""

_PREFIX = "nshtrainer_"


@dataclass(frozen=True)
class HookCall:
    """One plugin's implementation of a hook; calling it raises what the plugin raises."""

    dist: str
    caller: pluggy.HookCaller

    @property
    def hook(self) -> str:
        """The hook's name."""
        return self.caller.name

    def __call__(self, **arguments: Any) -> Any:
        """Call the implementation with *arguments*, and return what it returns."""
        results = self.caller(**arguments)
        return results[0] if results else None


class HookManager:
    """Loads hook modules when first needed and calls one implementation at a time."""

    def __init__(self) -> None:
        self.pluggy = pluggy.PluginManager("nshtrainer")
        self.pluggy.add_hookspecs(hookspecs)
        self._states: dict[Entry, PluginState] = {}
        self._entries: dict[str, Entry] = {}  # pluggy's name -> entry
        self._lock = threading.RLock()

    def register(self, plugin: object, name: str) -> None:
        """Register hook implementations that no distribution provides (a notebook, a test).

        Raises:
            PluginContractError: An implementation does not fit a hook; the message says which.
        """
        self._check(plugin)
        try:
            hash(plugin)  # pluggy keeps plugins in a set
        except TypeError:
            raise PluginContractError(
                f"{plugin!r} cannot hold hooks, because it cannot be hashed; use a module, or an "
                f"object of a class that leaves __eq__ alone"
            ) from None
        try:
            self.pluggy.register(plugin, name)
            self.pluggy.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            self.unregister(name)
            raise PluginContractError(str(error)) from error

    def unregister(self, name: str) -> None:
        """Take *name*'s implementations out; unknown names are ignored."""
        if self.pluggy.has_plugin(name):
            self.pluggy.unregister(name=name)

    def state(self, entry: Entry) -> PluginState:
        """The state of a hook module; nothing is loaded to find out."""
        by = self._disabled_by(entry)
        if by is not None:
            what = f"the hooks of {entry.dist} are switched off by {by}"
            return PluginState("disabled", what, "take it out of that switch")
        return self._states.get(entry, PluginState("available"))

    def implementations(self, entry: Entry) -> list[str]:
        """The hooks that a loaded *entry* implements."""
        plugin = self.pluggy.get_plugin(_key(entry))
        callers = self.pluggy.get_hookcallers(plugin) if plugin is not None else None
        return sorted(c.name for c in callers or ())

    def distributions(self) -> set[str]:
        """Distributions that have hook modules, and the names under which hooks were registered."""
        entries = {entry.dist for found in manifest().of(HOOKS).values() for entry in found}
        by_hand = {n for n, _ in self.pluggy.list_name_plugin() if n not in self._entries}
        return entries | by_hand

    def each(self, hook: str, only: Container[str] | None = None) -> Iterator[HookCall]:
        """The usable implementations of *hook*, in the order of their plugins' names.

        Args:
            hook: The hook's name.
            only: Distributions to ask; None is all.
        """
        self._load_all()
        plugins = self.pluggy.get_plugins()
        for name in sorted(n for p in plugins if (n := self.pluggy.get_name(p)) is not None):
            entry = self._entries.get(name)
            dist = entry.dist if entry else name
            if only is not None and dist not in only and normalized(dist) not in only:
                continue
            if entry and self._disabled_by(entry):
                continue
            mine = self.pluggy.get_plugin(name)
            if any(c.name == hook for c in self.pluggy.get_hookcallers(mine) or ()):
                others = [p for p in plugins if p is not mine]
                yield HookCall(dist, self.pluggy.subset_hook_caller(hook, others))

    def call(
        self, hook: str, only: Container[str] | None = None, **arguments: Any
    ) -> list[tuple[str, Any]]:
        """Call *hook* in every usable plugin; one that raises is logged and the others still run.

        Returns:
            The distribution and what its implementation returned, for each that succeeded.

        Raises:
            PluginLoadError: A plugin failed and `NSHTRAINER_PLUGINS_STRICT` is set.
        """
        results: list[tuple[str, Any]] = []
        for call in self.each(hook, only):
            with self.guarding(call):
                results.append((call.dist, call(**arguments)))
        return results

    @contextlib.contextmanager
    def guarding(self, call: HookCall) -> Generator[None]:
        """Whatever is raised inside the block is reported as the fault of *call*, and goes no further.

        `KeyboardInterrupt` alone passes; `sys.exit` in a hook does not end the program.

        Raises:
            PluginLoadError: A plugin failed and `NSHTRAINER_PLUGINS_STRICT` is set.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 -- one plugin's fault is not another's
            self.failed(call, error)

    def failed(self, call: HookCall, error: BaseException) -> None:
        """Record and log that a plugin raised *error* in a hook.

        Raises:
            PluginLoadError: `NSHTRAINER_PLUGINS_STRICT` is set.
        """
        said = str(error) if isinstance(error, Exception) else repr(error)
        log.warning(
            "plugin %s failed in %s and is left out: %s",
            call.dist,
            call.hook,
            said,
            exc_info=error,
        )
        for entry in self._entries.values():
            if entry.dist == call.dist:
                self._states[entry] = failed(entry, "call", error)
        if is_strict():
            raise PluginLoadError(f"plugin {call.dist} failed in {call.hook}: {said}") from error

    def _load_all(self) -> None:
        with self._lock:
            for entries in manifest().of(HOOKS).values():
                for entry in entries:
                    if entry not in self._states and self._disabled_by(entry) is None:
                        self._states[entry] = self._load(entry)

    def _load(self, entry: Entry) -> PluginState:
        plugin = load_object(entry)
        if isinstance(plugin, PluginState):
            log.warning("%s", plugin)
            return plugin
        try:
            self.register(plugin, _key(entry))
        except PluginContractError as error:
            state = failed(entry, "hooks", error)
            log.warning("%s", state)
            return state
        self._entries[_key(entry)] = entry
        return PluginState("loaded")

    @staticmethod
    def _disabled_by(entry: Entry) -> str | None:
        return next(filter(None, (p.disabled_by(entry) for p in active_policy())), None)

    def _check(self, plugin: object) -> None:
        """What pluggy does not see: a forgotten marker, a misspelt hook, keyword-only arguments."""
        known = [n for n in hookspecs.__all__ if n.startswith(_PREFIX)]
        for name, member in inspect.getmembers(plugin, callable):
            if not name.startswith(_PREFIX) or not isinstance(
                inspect.unwrap(getattr(member, "__func__", member)), FunctionType
            ):
                continue
            if name not in known:
                close = nearest(name, known)
                hint = f"; did you mean {close!r}?" if close else ""
                raise PluginContractError(
                    f"{name!r} is no hook of nshtrainer{hint} Known: {', '.join(known)}"
                )
            if not hasattr(member, "nshtrainer_impl"):
                raise PluginContractError(
                    f"{name!r} is not marked; decorate it with @nshtrainer.hookimpl"
                )
            _check_is_called(name, member)
            kinds = {p.kind for p in inspect.signature(member).parameters.values()}
            if inspect.Parameter.KEYWORD_ONLY in kinds:
                raise PluginContractError(
                    f"{name!r} has keyword-only arguments, which a hook cannot have; remove the `*`"
                )


def _check_is_called(name: str, member: Any) -> None:
    """Refuse what a call does not run: a coroutine, or a generator that nobody goes through."""
    if inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member):
        raise PluginContractError(
            f"{name!r} is an `async def`, which nobody awaits; write a plain `def`"
        )
    options: dict[str, Any] = member.nshtrainer_impl
    is_wrapper = options.get("wrapper") or options.get("hookwrapper")
    if inspect.isgeneratorfunction(member) and name not in _MAY_YIELD and not is_wrapper:
        raise PluginContractError(
            f"{name!r} has a `yield`, so that calling it would run nothing of it; use `return`"
        )


_MAY_YIELD = {"nshtrainer_default_callbacks"}
"""Hooks whose result is gone through, so that a generator is run."""


def _key(entry: Entry) -> str:
    return f"{entry.dist}:{entry.name}"


plugin_manager = HookManager()
"""The hook manager of this process."""
