"""From a configuration to one ordered list of Lightning callbacks."""

from __future__ import annotations

import contextlib
import copy as copies
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import Callback

from nshtrainer.errors import ConfigError, PluginContractError
from nshtrainer.plugins.hooks import plugin_manager
from nshtrainer.plugins.policy import normalized, using_policy
from nshtrainer.runtime.events import name_culprit
from nshtrainer.trainer.config import SLOTS, TrainerConfig

from .base import CallbackConfigBase, CallbackMetadataConfig, metadata_of
from .conflicts import check_config

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["create_callbacks", "resolve_callbacks"]

log = logging.getLogger(__name__)

_NO_METADATA = CallbackMetadataConfig()


@dataclass
class _Item:
    """One callback on its way into the list."""

    callback: Callback
    source: str
    """Where it comes from, in words."""
    rank: int
    """Which source wins when two give a callback of one identity: 0 slot, 1 list, 2 argument."""
    metadata: CallbackMetadataConfig = field(init=False)

    def __post_init__(self) -> None:
        self.metadata = metadata_of(self.callback) or _NO_METADATA


def create_callbacks(
    callbacks: TrainerConfig | Sequence[CallbackConfigBase | Mapping[str, Any] | str],
    **fields: Any,
) -> list[Callback]:
    """Return the Lightning callbacks for *callbacks*, to hand to any Lightning trainer.

    Args:
        callbacks: Configurations, mappings with a `name`, or names. Nothing else is added: slots
            that are on by default in a `TrainerConfig` are off here. A `TrainerConfig` gives all of
            its callbacks.
        fields: Other fields of `TrainerConfig` that callbacks look at (`primary_metric`, `directory`).

    Raises:
        pydantic.ValidationError: A configuration does not fit.
        ConfigError: Two callbacks cannot stand side by side.
    """
    if isinstance(callbacks, TrainerConfig):
        return resolve_callbacks(callbacks.replace(**fields) if fields else callbacks)
    items = [{"name": c} if isinstance(c, str) else c for c in callbacks]
    values: dict[str, Any] = {**dict.fromkeys(SLOTS), "loggers": [], **fields, "callbacks": items}
    return resolve_callbacks(TrainerConfig.model_validate(values))


def resolve_callbacks(
    config: TrainerConfig, extra: Iterable[Callback] = (), *, copy: bool = True
) -> list[Callback]:
    """Return the callbacks that *config* stands for, in their order.

    Slots, companions of loggers and `callbacks` are collected; in barebones mode only those stay
    that are enabled for it; they are sorted by priority; of several that say `ignore_if_exists`,
    one stays; then plugins have the last word.

    Args:
        config: The run; a validated deep copy is used, so what was appended is checked too.
        extra: Callbacks that no config describes; they follow the same rules.
        copy: False uses *config* itself, for a caller that made the copy.

    Raises:
        pydantic.ValidationError: Something that was put into *config* does not fit.
        ConfigError: Two callbacks cannot stand side by side, or a plugin finds a conflict.
        PluginContractError: A configuration's `create_callbacks` gives something else than callbacks;
            what it raises comes as it is, with a note that says which configuration it was.
    """
    config = config.revalidated() if copy else config
    with using_policy(config.plugins):
        check_config(config)
        _add_plugin_defaults(config)
        items = [*_from_config(config), *(_Item(c, "the trainer's arguments", 2) for c in extra)]
        items = _without_replaced(items)
        if config.barebones:
            items = _barebones(items)
        items.sort(key=lambda item: -item.metadata.priority)
        return _modified_by_plugins(config, [item.callback for item in _without_ignored(items)])


def _add_plugin_defaults(config: TrainerConfig) -> None:
    wanted = {normalized(dist) for dist in config.plugins.defaults}
    if not wanted:
        return
    for call in plugin_manager.each("nshtrainer_default_callbacks", only=wanted):
        own = copies.deepcopy(config, {id(config.run): config.run})
        with plugin_manager.guarding(call):
            added = _addable(call.dist, call(config=own), config)
            config.callbacks = [*config.callbacks, *added]
            for held in added:
                log.info("%s adds the callback %s", call.dist, held.identity)


def _addable(dist: str, result: Any, config: TrainerConfig) -> list[CallbackConfigBase]:
    """The callbacks that *dist* wants to add, without those that *config* has already.

    Raises:
        TypeError: Something else than configurations was returned.
    """
    if isinstance(result, CallbackConfigBase) or not isinstance(result, Iterable | None):
        raise TypeError(f"it returned {result!r:.80}, not a list of callback configurations")
    have = {c.identity for c in _configs(config)}
    added: list[CallbackConfigBase] = []
    for held in cast("Iterable[Any]", result or ()):
        if not isinstance(held, CallbackConfigBase):
            raise TypeError(f"it returned {held!r:.80} among the callback configurations")
        if held.identity not in have:
            have.add(held.identity)
            added.append(held.replace(added_by=dist))
    return added


def _configs(config: TrainerConfig) -> Iterator[CallbackConfigBase]:
    slots = (getattr(config, slot) for slot in SLOTS)
    yield from (c for c in slots if c is not None)
    yield from config.callbacks


def _from_config(config: TrainerConfig) -> Iterator[_Item]:
    for slot in SLOTS:
        if (held := cast("CallbackConfigBase | None", getattr(config, slot))) is not None:
            yield from _built(held, config, f"the slot `{slot}`", 0)
    for logger in config.loggers:
        if logger.enabled:
            source = f"the logger {getattr(logger, 'name', '')!r}"
            with _naming(source):
                companions = list(logger.companions(config))
            for companion in companions:
                yield from _built(companion, config, source, 0)
    for index, held in enumerate(config.callbacks):
        yield from _built(held, config, f"callbacks[{index}] ({held.identity})", 1)


def _built(held: CallbackConfigBase, config: TrainerConfig, source: str, rank: int) -> list[_Item]:
    with _naming(source):
        return [_Item(callback, source, rank) for callback in held.build(config)]


@contextlib.contextmanager
def _naming(source: str) -> Generator[None]:
    """Say that it was *source*, whatever is raised inside the block."""
    try:
        yield
    except PluginContractError as error:
        raise PluginContractError(f"{source}: {error}") from error
    except Exception as error:
        name_culprit(error, f"raised while the callbacks of {source} were made")
        raise


def _key(callback: Callback) -> str | None:
    """What two callbacks of one trainer must not share: the key of their state.

    One of nshtrainer's always counts; another one only if it keeps state, as with Lightning.
    """
    keeps_state = type(callback).state_dict is not Callback.state_dict
    is_ours = metadata_of(callback) is not None and callback.state_key.startswith("nshtrainer.")
    return callback.state_key if is_ours or keeps_state else None


def _without_replaced(items: list[_Item]) -> list[_Item]:
    """Of two with one identity the more explicit one stays; equally explicit ones are an error."""
    winners: dict[str, _Item] = {}
    for item in items:
        key = _key(item.callback)
        other = winners.get(key) if key is not None else None
        if key is None or other is None or item.rank > other.rank:
            if other is not None:
                log.info("%s replaces %s (%s)", item.source, other.source, key)
            if key is not None:
                winners[key] = item
        elif item.metadata.ignore_if_exists or other.metadata.ignore_if_exists:
            continue  # settled by _without_ignored, whatever the order
        else:
            raise ConfigError(
                f"{other.source} and {item.source} give the same callback twice ({key}); "
                f"remove one, or tell them apart with different `label`s"
            )
    return [i for i in items if (k := _key(i.callback)) is None or winners[k].rank <= i.rank]


def _barebones(items: list[_Item]) -> list[_Item]:
    kept = [i for i in items if i.metadata.enabled_for_barebones]
    left_out = [type(i.callback).__name__ for i in items if not i.metadata.enabled_for_barebones]
    if left_out:
        log.warning("barebones mode leaves out %s", ", ".join(left_out))
    return kept


def _without_ignored(items: list[_Item]) -> list[_Item]:
    """Drop a flagged callback if another of its class (or a subclass) is there; one always stays."""
    kept: list[_Item] = []
    for index, item in enumerate(items):
        cls = type(item.callback)
        exists = item.metadata.ignore_if_exists and (
            any(isinstance(other.callback, cls) for other in kept)
            or any(
                isinstance(other.callback, cls)
                and (not other.metadata.ignore_if_exists or type(other.callback) is not cls)
                for other in items[index + 1 :]
            )
        )
        if exists:
            log.debug("%s is left out: there is another %s", item.source, cls.__name__)
        else:
            kept.append(item)
    return kept


def _modified_by_plugins(config: TrainerConfig, callbacks: list[Callback]) -> list[Callback]:
    for call in plugin_manager.each("nshtrainer_modify_callbacks"):
        with plugin_manager.guarding(call):  # its changes are dropped, the run goes on
            changed = list(callbacks)
            result = call(config=config, callbacks=changed)
            changed = changed if result is None else list(result)
            _check_changed(callbacks, changed)
            _log_changes(call.dist, callbacks, changed)
            callbacks = changed
    return callbacks


def _check_changed(before: list[Callback], after: list[Callback]) -> None:
    """Find what Lightning would refuse later, when nobody knows any more who did it.

    Raises:
        TypeError: Something in *after* is no callback.
        ValueError: A callback, or the key of one's state, stands there twice.
    """
    if strangers := [c for c in after if not isinstance(c, Callback)]:  # pyright: ignore[reportUnnecessaryIsInstance] -- a plugin's list
        raise TypeError(f"it put {strangers[0]!r} among the callbacks, which is none")
    had = Counter(map(_mark, before))
    for mark, count in Counter(map(_mark, after)).items():
        if count > max(1, had[mark]):
            twice = next(c for c in after if _mark(c) == mark)
            key = f" (its state has the key {mark!r})" if isinstance(mark, str) else ""
            raise ValueError(
                f"it put {type(twice).__name__} in twice{key}; a trainer takes each callback once"
            )


def _mark(callback: Callback) -> str | int:
    """What only one callback of a trainer may have: the key of its state, else itself."""
    return _key(callback) or id(callback)


def _log_changes(dist: str, before: list[Callback], after: list[Callback]) -> None:
    added = [type(c).__name__ for c in after if not any(c is b for b in before)]
    removed = [type(b).__name__ for b in before if not any(b is c for c in after)]
    if added or removed:
        log.info("%s changed the callbacks: added %s, removed %s", dist, added, removed)
    elif before != after:
        log.info("%s changed the order of the callbacks", dist)
