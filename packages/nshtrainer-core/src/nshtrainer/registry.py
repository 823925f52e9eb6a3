"""The late-bound registry: names to config classes, looked up when a value is validated.

The annotation `Annotated[Base, registry]` compiles to a function schema, so a class that is
registered after a model was defined works in that model at once, nothing is rebuilt, and the cost
does not grow with the number of classes. The JSON schema is computed when it is asked for.
"""

from __future__ import annotations

import functools
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NoReturn, TypeVar, overload

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import override

from .errors import DuplicateNameError, PluginLoadError, PluginNotInstalledError
from .plugins.catalogue import install_command
from .plugins.loading import failed, is_loading, load_object
from .plugins.manifest import Entry, manifest
from .plugins.policy import active_policy, normalized
from .plugins.state import PluginState
from .slot import Slot
from .spelling import nearest

__all__ = ["Registry", "forget_all"]

T = TypeVar("T", bound=BaseModel)
C = TypeVar("C", bound=type[BaseModel])

_REGISTRIES: dict[str, Registry[Any]] = {}


def _registry_by_group(group: str) -> Registry[Any]:
    return _REGISTRIES[group]


def forget_all() -> None:
    """Let every registry look at the manifest anew; classes that were registered stay."""
    for registry in _REGISTRIES.values():
        registry._forget()  # pyright: ignore[reportPrivateUsage] -- the same module


def _complete(cls: type[BaseModel]) -> None:
    """Resolve annotations with the names of the code that registers *cls*.

    pydantic looks them up in the module that the class names, which code run by `exec` (a notebook,
    a documentation test) may not live in.
    """
    if not cls.__pydantic_complete__:
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] -- the documented way to the caller's names
        while frame.f_back is not None and frame.f_globals is globals():
            frame = frame.f_back
        names = {**frame.f_globals, **frame.f_locals}
        cls.model_rebuild(raise_errors=False, _types_namespace=names)


def _completed(cls: type[BaseModel]) -> None:
    """Resolve annotations that could not be when *cls* was made, with what its module has by now.

    Raises:
        TypeError: A name is missing still.
    """
    if cls.__pydantic_complete__:
        return
    module = sys.modules.get(cls.__module__)
    try:
        cls.model_rebuild(_types_namespace=vars(module) if module else {})
    except NameError as error:
        raise TypeError(
            f"an annotation of {cls.__qualname__} names {error.name!r}, which {cls.__module__} does "
            f"not have at run time; import it there, outside `if TYPE_CHECKING`"
        ) from error


def origin_of(cls: type) -> str:
    """`module:qualname`; a spawned child's `__mp_main__` is its parent's `__main__`."""
    module = "__main__" if cls.__module__ == "__mp_main__" else cls.__module__
    return f"{module}:{cls.__qualname__}"


def _package_of(origin: str) -> str:
    return origin.partition(":")[0].partition(".")[0]


class Registry(Generic[T]):
    """Name -> class, from decorators and from the entry points of one group.

    Args:
        group: The entry-point group.
        base: The class that all registered ones derive from.
        what: The word for a member in messages (`callback`).
        known: First-party names with their distribution and class name, to say what to install.
        discriminator: The field that carries the name.
    """

    def __init__(
        self,
        group: str,
        base: type[T],
        *,
        what: str,
        known: Mapping[str, tuple[str, str]] | None = None,
        discriminator: str = "name",
    ) -> None:
        self.group, self.base, self.what, self.discriminator = group, base, what, discriminator
        self.known = dict(known or {})
        self._local: dict[str, dict[str, type[T]]] = {}  # name -> origin -> class
        self._override: dict[str, str] = {}  # name -> origin that was registered with override
        self._loaded: dict[Entry, type[T] | PluginState] = {}
        self._resolved: dict[str, type[T]] = {}
        self._lock = threading.RLock()
        _REGISTRIES[group] = self

    # Identity survives copies of a field's metadata and pickled model classes.
    def __copy__(self) -> Registry[T]:
        return self

    def __deepcopy__(self, memo: Any) -> Registry[T]:
        return self

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return (_registry_by_group, (self.group,))

    @override
    def __repr__(self) -> str:
        return f"Registry({self.group!r}, {len(self.names())} names)"

    # ---- filling ---------------------------------------------------------------------------

    def name_of(self, cls: type[BaseModel]) -> str:
        """The name that *cls* carries.

        Raises:
            TypeError: It has no `name: Literal["x"] = "x"`.
        """
        field = cls.model_fields.get(self.discriminator)
        args = typing.get_args(field.annotation) if field is not None else ()
        is_literal = field is not None and typing.get_origin(field.annotation) is typing.Literal
        if field is None or not is_literal or len(args) != 1 or field.default != args[0]:
            raise TypeError(
                f"{cls.__qualname__} cannot be registered: it needs a line such as "
                f'`{self.discriminator}: Literal["my_{self.what}"] = "my_{self.what}"`'
            )
        return str(args[0])

    @overload
    def register(self, cls: C, *, override: bool = False) -> C: ...
    @overload
    def register(self, cls: None = None, *, override: bool = False) -> Callable[[C], C]: ...
    def register(self, cls: C | None = None, *, override: bool = False) -> C | Callable[[C], C]:
        """Make *cls* usable by its name; a decorator, with or without parentheses.

        The same module and qualified name registered again (a notebook cell that is run twice)
        replaces the old class. `override=True` takes a name over from whoever provides it.

        Raises:
            TypeError: *cls* is no subclass of the base, or has no name.
            DuplicateNameError: Another registered class has the name.
        """
        if cls is None:
            return functools.partial(self._register, override=override)
        return self._register(cls, override=override)

    def _register(self, cls: C, *, override: bool) -> C:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):  # pyright: ignore[reportUnnecessaryIsInstance] -- users are not type-checked
            raise TypeError(
                f"{cls!r} cannot be registered: it is not a subclass of {self.base.__qualname__}"
            )
        _complete(cls)
        name, origin = self.name_of(cls), origin_of(cls)
        with self._lock:
            mine = self._local.setdefault(name, {})
            others = [o for o in mine if o != origin]
            if others and not override and name not in self._override and not is_loading():
                raise DuplicateNameError(
                    f"the {self.what} name {name!r} is taken by {others[0]}, {origin} cannot have "
                    f"it too; rename one, or register with override=True"
                )
            if override:
                self._override[name] = origin
            mine[origin] = cls
            self._forget(name)
        return cls  # pyright: ignore[reportReturnType] -- narrowed to the base by the check above

    def unregister(self, name: str) -> None:
        """Forget the classes that decorators registered under *name*; entry points stay."""
        with self._lock:
            self._local.pop(name, None)
            self._override.pop(name, None)
            self._forget(name)

    def _forget(self, name: str | None = None) -> None:
        with self._lock:
            if name is None:
                self._resolved.clear()
            else:
                self._resolved.pop(name, None)
            self._loaded = {
                e: s
                for e, s in self._loaded.items()
                if isinstance(s, type) or name not in {None, e.name}
            }

    # ---- looking up ------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every name that is registered or provided by an installed plugin, usable or not."""
        return sorted({*(n for n, c in self._local.items() if c), *manifest().of(self.group)})

    def get(self, name: str) -> type[T] | None:
        """The class called *name*, loaded now if need be; None if it cannot be used."""
        found = self.resolve(name)
        return found if isinstance(found, type) else None

    def __getitem__(self, name: str) -> type[T]:
        """The class called *name*.

        Raises:
            PluginNotInstalledError: A known family that provides it is missing.
            DuplicateNameError: Several distributions provide it.
            PluginLoadError: Its plugin cannot be used.
            KeyError: Nobody knows it.
        """
        found = self.resolve(name)
        if not isinstance(found, type):
            self._raise(name, found)
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[type[T]]:
        return iter(self.load_all().values())

    def load_all(self) -> dict[str, type[T]]:
        """Name -> class for all that can be used; loads every plugin of the group."""
        found = {name: self.get(name) for name in self.names()}
        return {name: cls for name, cls in found.items() if cls is not None}

    def resolve(self, name: str) -> type[T] | PluginState | None:
        """The class called *name*, the state that keeps it from use, or None if nobody has it."""
        policies = active_policy()
        if not policies and (cls := self._resolved.get(name)) is not None:
            return cls  # the hot path: one dict hit
        with self._lock:
            found = self._resolve(name)
            if isinstance(found, type) and not policies:
                self._resolved[name] = found
            return found

    def _resolve(self, name: str) -> type[T] | PluginState | None:
        entries, off = self._split(manifest().of(self.group).get(name, ()))
        local = {
            o: c
            for o, c in self._local.get(name, {}).items()
            if not any(self._may_be_of(e, c) for e, _ in off)
        }
        if (origin := self._override.get(name)) in local:
            return self._usable(name, local[origin])
        chosen = self._preferred(name, entries)
        if len(chosen) > 1:
            return self._clash(name, [str(e) for e in chosen])
        if not chosen:
            if len(local) > 1:
                return self._clash(name, list(local))
            if not local:
                return off[0][1] if off else None
            return self._usable(name, next(iter(local.values())))
        loaded = self._load(chosen[0])
        if not isinstance(loaded, type) or chosen is not entries:
            return loaded
        others = [o for o in local if o != origin_of(loaded)]
        return self._clash(name, [str(chosen[0]), *others]) if others else loaded

    def _may_be_of(self, entry: Entry, cls: type[T]) -> bool:
        """Whether *cls*, which has the name of *entry*, is what that names; nothing is imported.

        An entry point often names a re-export. One that was not imported, or that is made on demand
        (`__getattr__` of a module), cannot be followed; there the same package is enough.
        """
        origin, target = origin_of(cls), entry.target
        found = self._imported(entry)
        if found is not None:
            return origin in {target, origin_of(found)}
        return origin == target or _package_of(origin) == _package_of(target)

    def _imported(self, entry: Entry) -> type | None:
        """The class that *entry* names, if it was imported; nothing is imported for it."""
        known = self._loaded.get(entry)
        if isinstance(known, type):
            return known
        module, _, qualname = entry.target.partition(":")
        found: object = sys.modules.get(module)
        for part in qualname.split("."):
            found = getattr(found, "__dict__", {}).get(part)
        return found if isinstance(found, type) else None

    def _usable(self, name: str, cls: type[T]) -> type[T] | PluginState:
        """*cls*, which no entry point names, or why it cannot be used."""
        try:
            _completed(cls)
        except Exception as error:  # noqa: BLE001 -- pydantic runs code of the class
            what = f"{origin_of(cls)}, which is registered as the {self.what} {name!r}, is no usable class"
            return PluginState("broken", f"{what}: {error}", stage="type", error=error)
        return cls

    @staticmethod
    def _split(
        entries: tuple[Entry, ...],
    ) -> tuple[list[Entry], list[tuple[Entry, PluginState]]]:
        """The entries that may be used, and those that are switched off with the reason."""
        active: list[Entry] = []
        off: list[tuple[Entry, PluginState]] = []
        for entry in entries:
            by = next(filter(None, (p.disabled_by(entry) for p in active_policy())), None)
            if by is None:
                active.append(entry)
            else:
                what = f"{entry.name!r} of {entry.dist} is switched off by {by}"
                off.append((entry, PluginState("disabled", what, "take it out of that switch")))
        return active, off

    @staticmethod
    def _preferred(name: str, entries: list[Entry]) -> list[Entry]:
        """Only what a `prefer` switch names, if one names *name*; else *entries* itself."""
        for policy in reversed(active_policy()):  # the config's before the environment's
            dist = policy.prefer.get(normalized(name))
            if dist is not None and (chosen := [e for e in entries if normalized(e.dist) == dist]):
                return chosen
        return entries

    def _clash(self, name: str, providers: list[str]) -> PluginState:
        return PluginState(
            "clash",
            f"the {self.what} name {name!r} is provided by {' and by '.join(sorted(providers))}",
            f"uninstall one, or choose with NSHTRAINER_PREFER={name}=DISTRIBUTION "
            f"or the config's plugins.prefer",
        )

    def _load(self, entry: Entry) -> type[T] | PluginState:
        known = self._loaded.get(entry)
        newest = self._newest(entry, origin_of(known) if isinstance(known, type) else entry.target)
        if newest is not None and newest is not known:  # imported already, or redefined since
            known = self._loaded[entry] = self._checked(entry, newest)
        if known is not None:
            return known
        before = {name: dict(classes) for name, classes in self._local.items()}
        found = self._checked(entry, load_object(entry))
        if isinstance(found, PluginState):
            self._local = before  # undo half-made registrations
        else:  # a re-export may be older than what its module has by now
            found = self._newest(entry, origin_of(found)) or found
        self._loaded[entry] = found
        return found

    def _newest(self, entry: Entry, origin: str) -> type[T] | None:
        """The class of *origin* that a decorator registered last under the name of *entry*."""
        return self._local.get(entry.name, {}).get(origin)

    def _checked(self, entry: Entry, found: Any) -> type[T] | PluginState:
        if isinstance(found, PluginState):
            return found
        try:
            if not (isinstance(found, type) and issubclass(found, self.base)):
                raise TypeError(f"{found!r} is not a subclass of {self.base.__qualname__}")  # noqa: TRY301 -- told below, as what the import raises is
            _completed(found)
            if (name := self.name_of(found)) != entry.name:
                raise TypeError(f"its class has the name {name!r}, the entry point {entry.name!r}")  # noqa: TRY301 -- as above
        except Exception as error:  # noqa: BLE001 -- pydantic runs code of the class
            return failed(entry, "type", error)
        return found

    def entry_of(self, cls: type) -> Entry | None:
        """The entry point that *cls* comes from, None for a class that only a decorator registered."""
        origin = origin_of(cls)
        for entries in manifest().of(self.group).values():
            for entry in entries:
                known = self._loaded.get(entry)
                if origin in {entry.target, origin_of(known) if isinstance(known, type) else None}:
                    return entry
        return None

    def state(self, entry: Entry) -> PluginState:
        """The state of *entry*; nothing is loaded to find out."""
        active, off = self._split((entry,))
        if not active:
            return off[0][1]
        entries, _ = self._split(manifest().of(self.group).get(entry.name, ()))
        preferred = self._preferred(entry.name, entries)
        if len(preferred) > 1:
            return self._clash(entry.name, [str(e) for e in preferred])
        if entry not in preferred:
            return PluginState("disabled", f"{entry.name!r} is taken from {preferred[0].dist}")
        loaded = self._loaded.get(entry)
        if isinstance(loaded, PluginState):
            return loaded
        is_loaded = loaded is not None or self._newest(entry, entry.target) is not None
        return PluginState("loaded" if is_loaded else "available")

    # ---- errors ----------------------------------------------------------------------------

    def _unknown(self, name: str) -> str:
        known = self.names()
        close = nearest(name, [*known, *self.known])
        hint = f"Did you mean {close!r}? " if close else ""
        return f"no {self.what} is named {name!r}. {hint}Known: {', '.join(known) or 'none'}"

    def _raise(self, name: str, state: PluginState | None) -> NoReturn:
        if state is not None:
            error = DuplicateNameError if state.kind == "clash" else PluginLoadError
            raise error(str(state)) from state.error
        if name in self.known:
            raise PluginNotInstalledError(self._missing(name))
        raise KeyError(self._unknown(name))

    def _missing(self, name: str) -> str:
        dist, _ = self.known[name]
        return f"the {self.what} {name!r} is provided by {dist}, which is not installed; run `{install_command(dist)}`"

    def problem(self, name: Any) -> PydanticCustomError:
        """The validation error for a *name* that cannot be used."""
        if not isinstance(name, str):
            return PydanticCustomError(
                "name_type",
                "`{field}` must be text, not {type}",
                {"field": self.discriminator, "type": type(name).__name__},
            )
        state = self.resolve(name)
        if isinstance(state, PluginState):
            return _custom_error(f"plugin_{state.kind}", str(state))
        if name in self.known:
            return _custom_error("plugin_not_installed", self._missing(name))
        return _custom_error("unknown_name", self._unknown(name))

    # ---- annotation ------------------------------------------------------------------------

    def slot(self, *names: str, default: str | None = None) -> Slot[T]:
        """An annotation for a field that takes only *names*; one name need not be written out."""
        return Slot(self, names, default or (names[0] if len(names) == 1 else None))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return self.slot().__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return self.slot().__get_pydantic_json_schema__(schema, handler)


def _custom_error(kind: Any, text: str) -> PydanticCustomError:
    """A custom error whose *text* is shown as it is (braces are pydantic's placeholders)."""
    return PydanticCustomError(kind, "{text}", {"text": text})
