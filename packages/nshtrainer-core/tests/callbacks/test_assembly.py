"""From configurations to one ordered list of callbacks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, Checkpoint
from pydantic import ValidationError

from nshtrainer import (
    CallbackConfigBase,
    CallbackMetadataConfig,
    ConfigError,
    ConfiguredCallback,
    LoggerConfigBase,
    PluginContractError,
    PluginLoadError,
    Trainer,
    TrainerConfig,
    callback_registry,
    create_callbacks,
    hookimpl,
    logger_registry,
    plugin_manager,
    resolve_callbacks,
)
from nshtrainer.trainer.config import SLOTS

pytestmark = pytest.mark.usefixtures("clean_registry")
BARE: dict[str, Any] = {**dict.fromkeys(SLOTS), "loggers": []}


class Plain(Callback):
    def __init__(self, tag: str = "") -> None:
        self.tag = tag


class SubPlain(Plain):
    pass


class Saver(Checkpoint):
    def __init__(self, tag: str = "") -> None:
        self.tag = tag


class Keeper(Plain):
    def state_dict(self) -> dict[str, Any]:
        return {"tag": self.tag}


class PlainConfig(CallbackConfigBase):
    name: Literal["plain"] = "plain"
    tag: str = ""
    kind: Literal["plain", "sub", "saver"] = "plain"

    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterator[Callback]:
        yield {"plain": Plain, "sub": SubPlain, "saver": Saver}[self.kind](self.tag)


class StatefulConfig(CallbackConfigBase):
    name: Literal["stateful"] = "stateful"
    value: int = 0

    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterator[Callback]:
        yield Stateful(self)


class Stateful(ConfiguredCallback[StatefulConfig]):
    config_class = StatefulConfig

    def __init__(self, config: StatefulConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)


@pytest.fixture(autouse=True)
def registered(clean_registry: None) -> None:
    callback_registry.register(PlainConfig)
    callback_registry.register(StatefulConfig)


def plain(tag: str, kind: str = "plain", **metadata: Any) -> dict[str, Any]:
    return {"name": "plain", "tag": tag, "kind": kind, "metadata": metadata}


def tags(*entries: dict[str, Any], extra: list[Callback] | None = None, **fields: Any) -> list[str]:
    config = TrainerConfig(**{**BARE, **fields}, callbacks=list(entries))
    return [c.tag for c in resolve_callbacks(config, extra or [])]


def test_higher_priority_comes_earlier_and_equal_ones_keep_their_order():
    """Sorted by descending priority, stable; a file can set it."""
    assert tags(plain("a"), plain("b", priority=5), plain("c"), plain("d", priority=-1), plain("e", priority=5)) == [
        "b", "e", "a", "c", "d",
    ]  # fmt: skip


def test_priority_orders_checkpoints_among_themselves_only():
    """Lightning moves checkpoint callbacks last and keeps their order."""
    config = TrainerConfig(
        **BARE, callbacks=[plain("s1", "saver"), plain("p"), plain("s2", "saver", priority=100)]
    )
    trainer = Trainer(config.replace(enable_progress_bar=False, enable_model_summary=False))
    order = [c.tag for c in trainer.callbacks if hasattr(c, "tag")]

    assert order == ["p", "s2", "s1"]


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_that_ignore_if_exists_one_stays(first: int):
    """All carried the flag and all were dropped; the one of highest priority stays."""
    entries = [
        plain("x", ignore_if_exists=True, priority=first),
        plain("y", ignore_if_exists=True, priority=1 - first),
    ]

    assert tags(*entries) == ["x" if first else "y"]


@pytest.mark.parametrize("order", [1, -1])
def test_an_unflagged_one_makes_every_flagged_one_of_its_class_go(order: int):
    """The flag gives way to a callback that does not carry it, whatever the order."""
    entries = [plain("flagged", ignore_if_exists=True), plain("other")][::order]

    assert tags(*entries) == ["other"]


def test_the_rule_covers_every_source_and_subclasses():
    """A callback given to the trainer counts, and so does one of a subclass."""
    flagged = plain("flagged", ignore_if_exists=True)

    assert tags(flagged, extra=[Plain("given")]) == ["given"]
    assert tags(flagged, extra=[SubPlain("given")]) == ["given"]
    assert tags(plain("flagged", "sub", ignore_if_exists=True), extra=[Plain("given")]) == [
        "flagged",
        "given",
    ]


def test_barebones_keeps_what_is_enabled_for_it_and_names_the_rest(
    caplog: pytest.LogCaptureFixture,
):
    """What is left out is said in one line."""
    with caplog.at_level(logging.WARNING):
        kept = tags(plain("kept", enabled_for_barebones=True), plain("dropped"), barebones=True)

    assert kept == ["kept"]
    assert [r.message for r in caplog.records if "barebones" in r.message] == [
        "barebones mode leaves out Plain"
    ]


def test_metadata_of_a_nested_config_counts():
    """A config that builds others through `build` keeps their metadata."""

    @callback_registry.register
    class Outer(CallbackConfigBase):
        name: Literal["outer"] = "outer"

        def create_callbacks(self, trainer_config: TrainerConfig) -> Iterator[Callback]:
            yield from PlainConfig(tag="inner", metadata=CallbackMetadataConfig(priority=9)).build(
                trainer_config
            )
            yield Plain("own")

    assert tags(plain("first"), {"name": "outer"}) == ["inner", "first", "own"]


@pytest.mark.parametrize("form", ["field", "class variable", "plain value", "dict"])
def test_a_class_states_its_metadata_in_any_form_and_a_file_overrides_parts(form: str):
    """The class default holds; a file changes one part and keeps the others."""
    lines = {
        "field": "metadata: CallbackMetadataConfig = CallbackMetadataConfig(priority=3, ignore_if_exists=True)",
        "class variable": "metadata: ClassVar[CallbackMetadataConfig] = {'priority': 3, 'ignore_if_exists': True}",
        "plain value": "metadata = CallbackMetadataConfig(priority=3, ignore_if_exists=True)",
        "dict": "metadata = {'priority': 3, 'ignore_if_exists': True}",
    }
    namespace: dict[str, Any] = {}
    exec(  # noqa: S102 -- four spellings of one class
        "from typing import ClassVar, Literal\n"
        "from nshtrainer import CallbackConfigBase, CallbackMetadataConfig, callback_registry\n"
        "@callback_registry.register\n"
        "class Mine(CallbackConfigBase):\n"
        "    name: Literal['mine'] = 'mine'\n"
        f"    {lines[form]}\n",
        namespace,
    )
    cls = namespace["Mine"]

    assert cls().metadata == CallbackMetadataConfig(priority=3, ignore_if_exists=True)
    assert cls(metadata={"priority": 8}).metadata == CallbackMetadataConfig(
        priority=8, ignore_if_exists=True
    )


def test_one_yielded_callback_can_have_metadata_of_its_own():
    """`with_metadata` overrides parts for a single callback."""

    @callback_registry.register
    class Two(CallbackConfigBase):
        name: Literal["two"] = "two"

        def create_callbacks(self, trainer_config: TrainerConfig) -> Iterator[Callback]:
            yield Plain("late")
            yield self.with_metadata(Plain("early"), priority=10)

    assert tags({"name": "two"}) == ["early", "late"]


def test_two_of_one_identity_are_a_clear_error_unless_labelled():
    """Never Lightning's 'more than one stateful callback'; a label gives each its own state."""
    twice = [{"name": "stateful"}, {"name": "stateful", "value": 1}]
    with pytest.raises(
        ConfigError, match=r"callbacks\[0\].*callbacks\[1\].*nshtrainer.stateful.*`label`"
    ):
        resolve_callbacks(TrainerConfig(**BARE, callbacks=twice))

    labelled = [{"name": "stateful"}, {"name": "stateful", "label": "second"}]
    found = resolve_callbacks(TrainerConfig(**BARE, callbacks=labelled))
    assert [c.state_key for c in found] == ["nshtrainer.stateful", "nshtrainer.stateful#second"]


def test_a_callback_given_to_the_trainer_replaces_the_configured_one():
    """The more explicit one of two with one identity stays."""
    config = TrainerConfig(**BARE, callbacks=[{"name": "stateful", "value": 1}])
    found = resolve_callbacks(config, [create_callbacks([{"name": "stateful", "value": 2}])[0]])

    assert [c.config.value for c in found] == [2]


def test_every_call_makes_fresh_callbacks_and_leaves_the_config_alone():
    """Two trainers share nothing, and resolving changes nothing."""
    config = TrainerConfig(**BARE, callbacks=[{"name": "stateful"}])
    before = config.model_dump()
    first, second = resolve_callbacks(config), resolve_callbacks(config)

    assert first[0] is not second[0]
    assert first[0].config is not second[0].config
    assert config.model_dump() == before


def test_what_was_appended_unchecked_is_checked_before_training():
    """A list can be appended to without validation; resolving validates a copy."""
    config = TrainerConfig(**BARE)
    config.callbacks.append({"name": "stateful", "value": "x"})

    with pytest.raises(ValidationError, match=r"callbacks.0.stateful.value"):
        resolve_callbacks(config)


def test_create_callbacks_adds_nothing_that_was_not_asked_for():
    """Names, mappings and configs are taken; slots that are on by default stay off."""
    found = create_callbacks(["stateful", plain("x"), PlainConfig(tag="y")])

    assert [type(c).__name__ for c in found] == ["Stateful", "Plain", "Plain"]
    assert all(isinstance(c, Callback) for c in pl.Trainer(callbacks=found, logger=False).callbacks)


def test_a_callback_takes_its_config_or_its_options_but_not_both():
    """`X(config)` and `X(value=1)` are the same; a mixture is refused."""
    assert Stateful(StatefulConfig(value=3)).config == Stateful(value=3).config
    with pytest.raises(TypeError, match="not both"):
        Stateful(StatefulConfig(), value=3)
    with pytest.raises(TypeError, match="a StatefulConfig is expected, not dict"):
        Stateful({"value": 3})
    with pytest.raises(ValidationError, match="did you mean 'value'"):
        Stateful(valu=3)


def test_per_batch_hooks_that_a_callback_does_not_implement_cost_nothing():
    """They are None on the instance, which Lightning skips."""
    assert Stateful().on_train_batch_start is None
    assert callable(Stateful().on_train_start)


class _Hooks:
    """A plugin's hook module, as an object."""

    def __init__(self, **hooks: Any) -> None:
        for name, function in hooks.items():
            setattr(self, name, hookimpl(function))


@pytest.fixture
def plugin() -> Iterator[Any]:
    names: list[str] = []

    def register(name: str, **hooks: Any) -> None:
        names.append(name)
        plugin_manager.register(_Hooks(**hooks), name)

    yield register
    for name in names:
        plugin_manager.unregister(name)


def test_a_plugins_defaults_are_added_only_when_the_config_asks_for_them(plugin: Any):
    """Installing must not change a run; what is added says by whom, and a dump adds nothing again."""
    plugin("acme", nshtrainer_default_callbacks=lambda config: [StatefulConfig(value=7)])
    seen: list[TrainerConfig] = []
    plugin("spy", nshtrainer_modify_callbacks=lambda config, callbacks: seen.append(config))

    assert resolve_callbacks(TrainerConfig(**BARE)) == []
    found = resolve_callbacks(TrainerConfig(**BARE, plugins={"defaults": ["acme"]}))
    again = resolve_callbacks(TrainerConfig.model_validate(seen[-1].model_dump()))

    assert [c.config.value for c in found] == [7]
    assert seen[1].callbacks[0].added_by == "acme"
    assert len(again) == 1


def test_a_failing_modification_is_undone_and_the_others_still_run(
    plugin: Any, caplog: pytest.LogCaptureFixture
):
    """What a hook changed before it raised does not stay; what changed is logged."""

    def clear_then_raise(config: Any, callbacks: list[Callback]) -> None:
        callbacks.clear()
        raise RuntimeError("boom")

    plugin("bad", nshtrainer_modify_callbacks=clear_then_raise)
    plugin("stranger", nshtrainer_modify_callbacks=lambda config, callbacks: [3])
    plugin(
        "good", nshtrainer_modify_callbacks=lambda config, callbacks: [*callbacks, Plain("added")]
    )
    with caplog.at_level(logging.INFO):
        found = tags(plain("first"))

    assert found == ["first", "added"]
    assert "plugin bad failed in nshtrainer_modify_callbacks" in caplog.text
    assert "plugin stranger failed" in caplog.text
    assert "good changed the callbacks: added ['Plain'], removed []" in caplog.text


def test_a_plugin_can_refuse_a_config_that_contradicts_itself(plugin: Any):
    """`nshtrainer_validate_config` raising ValueError stops the run before it starts."""

    def refuse(config: TrainerConfig) -> None:
        raise ValueError("EMA and SWA do not go together")

    plugin("acme", nshtrainer_validate_config=refuse)
    with pytest.raises(ConfigError, match="acme: EMA and SWA do not go together"):
        resolve_callbacks(TrainerConfig(**BARE))


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        (5, "it returned 5, not a list of callback configurations"),
        ([5], "it returned 5 among the callback configurations"),
        ([{"name": "stateful"}], "it returned {'name': 'stateful'} among"),
        (StatefulConfig(), "it returned StatefulConfig("),
        ([StatefulConfig(), "x"], "it returned 'x' among"),
    ],
)
def test_defaults_that_are_no_configurations_are_the_plugins_failure(
    plugin: Any, caplog: pytest.LogCaptureFixture, returns: Any, said: str
):
    """The plugin is named and adds nothing at all; the other plugins' defaults are added."""
    plugin("acme", nshtrainer_default_callbacks=lambda config: returns)
    plugin("good", nshtrainer_default_callbacks=lambda config: [PlainConfig(tag="good")])
    found = tags(plugins={"defaults": ["acme", "good"]})

    assert found == ["good"]
    assert (
        f"plugin acme failed in nshtrainer_default_callbacks and is left out: {said}" in caplog.text
    )


def test_defaults_may_be_yielded_and_may_be_none(plugin: Any):
    """An iterable is asked for; a plugin that has nothing to add returns nothing."""

    def two(config: TrainerConfig) -> Iterator[CallbackConfigBase]:
        yield PlainConfig(tag="a")
        yield PlainConfig(tag="b", label="second")

    plugin("acme", nshtrainer_default_callbacks=two)
    plugin("none", nshtrainer_default_callbacks=lambda config: None)

    assert tags(plugins={"defaults": ["acme", "none"]}) == ["a", "b"]


def test_a_default_that_nobody_registered_is_the_plugins_failure(
    plugin: Any, caplog: pytest.LogCaptureFixture
):
    """What the config refuses is reported like what the hook raises."""

    class Unknown(CallbackConfigBase):
        name: Literal["unknown"] = "unknown"

    plugin("acme", nshtrainer_default_callbacks=lambda config: [Unknown()])

    assert tags(plain("mine"), plugins={"defaults": ["acme"]}) == ["mine"]
    assert "plugin acme failed in nshtrainer_default_callbacks" in caplog.text


@pytest.mark.parametrize(
    "hook",
    ["nshtrainer_default_callbacks", "nshtrainer_validate_config", "nshtrainer_modify_callbacks"],
)
def test_a_hook_that_calls_exit_does_not_end_the_program(
    plugin: Any, caplog: pytest.LogCaptureFixture, hook: str
):
    """It is reported as the plugin's failure, and the callbacks are resolved."""

    def leave(config: TrainerConfig) -> None:
        sys.exit(3)

    plugin("acme", **{hook: leave})

    assert tags(plain("mine"), plugins={"defaults": ["acme"]}) == ["mine"]
    assert f"plugin acme failed in {hook} and is left out: SystemExit(3)" in caplog.text


def test_a_check_sees_a_copy_of_the_config(plugin: Any):
    """What a plugin edits while it checks stays with it; the run that it sees is the real one."""
    seen: list[TrainerConfig] = []

    def edit(config: TrainerConfig) -> None:
        config.max_epochs = 99
        config.callbacks[0].tag = "edited"
        config.meta["edited"] = True
        seen.append(config)

    plugin("a-edits", nshtrainer_validate_config=edit)
    plugin("b-edits", nshtrainer_validate_config=edit)
    config = TrainerConfig(**BARE, callbacks=[plain("mine")], max_epochs=1)
    found = resolve_callbacks(config, copy=False)

    assert [c.tag for c in found] == ["mine"]
    assert (config.max_epochs, config.meta, config.callbacks[0].tag) == (1, {}, "mine")
    assert seen[0] is not seen[1]
    assert seen[0].run is seen[1].run is config.run


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (lambda callbacks: callbacks.append(callbacks[0]), "it put Plain in twice; "),
        (lambda callbacks: callbacks.append(callbacks[1]), "it put Stateful in twice"),
        (
            lambda callbacks: callbacks.extend([Keeper(), Keeper()]),
            "it put Keeper in twice (its state has the key 'Keeper')",
        ),
    ],
    ids=["itself", "itself with state", "two of one key"],
)
def test_a_callback_that_a_plugin_puts_in_twice_is_that_plugins_failure(
    plugin: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    put: Any,
    says: str,
):
    """Lightning would refuse the list and name nobody; here the hook's changes are dropped."""
    plugin("acme", nshtrainer_modify_callbacks=lambda config, callbacks: put(callbacks))
    config = TrainerConfig(**BARE, callbacks=[plain("first"), {"name": "stateful"}])
    found = resolve_callbacks(config)

    assert [type(c) for c in found] == [Plain, Stateful]
    assert (
        f"plugin acme failed in nshtrainer_modify_callbacks and is left out: {says}" in caplog.text
    )
    monkeypatch.setenv("NSHTRAINER_PLUGINS_STRICT", "1")
    with pytest.raises(PluginLoadError, match=r"plugin acme failed .* in twice"):
        resolve_callbacks(config)


def wrong(body: str) -> type[CallbackConfigBase]:
    """A registered class `wrong` whose `create_callbacks` is *body*."""
    names: dict[str, Any] = {"__name__": "acme"}
    exec(  # noqa: S102 -- many bodies of one class
        "import sys\n"
        "from typing import Literal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "from nshtrainer import CallbackConfigBase, callback_registry\n"
        "@callback_registry.register\n"
        "class Wrong(CallbackConfigBase):\n"
        "    name: Literal['wrong'] = 'wrong'\n"
        "    def create_callbacks(self, trainer_config):\n"
        f"        {body}\n",
        names,
    )
    return names["Wrong"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return None", "returned None, not several callbacks; `yield` each"),
        ("return Callback()", r"returned <.*> \(Callback\), not several callbacks; .*a list"),
        ("return self", r"returned Wrong\(.*\(Wrong\), not several callbacks"),
        ("yield None", "gave None, which is no callback of lightning.pytorch; `yield`"),
        ("yield self", r"gave Wrong\(.*\(Wrong\), which is no callback"),
        ("return 'ema'", r"gave 'e' \(str\), which is no callback"),
        ("sys.exit(4)", r"tried to end the program \(SystemExit\(4\)\); raise an error"),
        ("yield sys.exit('no')", r"tried to end the program \(SystemExit\('no'\)\)"),
    ],
)
@pytest.mark.parametrize("place", ["callbacks", "companion"])
def test_a_config_that_gives_no_callbacks_is_named_with_its_place(body: str, says: str, place: str):
    """What it gave, where it stands, and what to write instead."""
    made = wrong(body)()
    where = r"callbacks\[1\] \(wrong\)" if place == "callbacks" else "the logger 'acme'"
    match = rf"{where}: acme.Wrong.create_callbacks {says}"
    if place == "callbacks":
        config = TrainerConfig(**BARE, callbacks=[plain("first"), made])
    else:
        config = TrainerConfig(**{**BARE, "loggers": [logger_with(made)]})

    with pytest.raises(PluginContractError, match=match):
        resolve_callbacks(config)


def logger_with(companion: Any) -> LoggerConfigBase:
    """A logger's configuration that brings *companion*."""

    @logger_registry.register
    class Acme(LoggerConfigBase):
        name: Literal["acme"] = "acme"

        def companions(self, trainer_config: TrainerConfig) -> Any:
            return companion if companion is None else [companion]

    return Acme()


def _notes(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    """The notes of *error*; Python 3.10 has none, and they are logged."""
    return "\n".join(getattr(error, "__notes__", [])) or caplog.text


@pytest.mark.parametrize(
    ("body", "kind"), [("raise KeyError('zz')", KeyError), ("import acme_heavy", ImportError)]
)
def test_what_a_config_raises_keeps_its_kind_and_says_where_it_was(
    caplog: pytest.LogCaptureFixture, body: str, kind: type[Exception]
):
    """`except` clauses still match; a note has the place of the configuration."""
    made = wrong(body)()

    with pytest.raises(kind) as caught:
        create_callbacks([made])
    assert "while the callbacks of callbacks[0] (wrong) were made" in _notes(caught.value, caplog)


def test_a_logger_without_a_list_of_companions_is_named(caplog: pytest.LogCaptureFixture):
    """The same for what comes with a logger."""
    with pytest.raises(TypeError) as caught:
        resolve_callbacks(TrainerConfig(**{**BARE, "loggers": [logger_with(None)]}))
    assert "callbacks of the logger 'acme'" in _notes(caught.value, caplog)
