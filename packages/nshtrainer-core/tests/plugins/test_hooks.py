"""Hook implementations: checked when they are loaded, called one by one, each by itself."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING

import pytest

from nshtrainer import PluginContractError, PluginLoadError, TrainerConfig, hookimpl, plugin_manager
from nshtrainer.plugins.manifest import HOOKS, manifest

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment

GOOD = """
from nshtrainer import hookimpl

@hookimpl
def nshtrainer_run_metadata(config):
    return {"from": __name__}
"""
FAILS = GOOD.replace("return", "raise RuntimeError('no disk'); return")


def hooks(plugins: PluginEnvironment, dist: str, source: str) -> None:
    """Install a distribution with one hook module, which has its name."""
    module = dist.replace("-", "_")
    plugins.fake_distribution(dist, {HOOKS: f"{module} = {module}"}, modules={module: source})


def ask(**only: object) -> dict[str, object]:
    """What each plugin answers to `nshtrainer_run_metadata`."""
    return dict(plugin_manager.call("nshtrainer_run_metadata", config=TrainerConfig(), **only))


BROKEN = {
    "no marker": (
        "def nshtrainer_run_metadata(config): return {}",
        r"'nshtrainer_run_metadata' is not marked; decorate it with @nshtrainer\.hookimpl",
    ),
    "misspelt, not marked": (
        "def nshtrainer_run_metadta(config): return {}",
        "'nshtrainer_run_metadta' is no hook of nshtrainer; did you mean 'nshtrainer_run_metadata'",
    ),
    "misspelt, marked": (
        "@hookimpl\ndef nshtrainer_validate_configs(config): pass",
        "no hook of nshtrainer; did you mean 'nshtrainer_validate_config'",
    ),
    "wrong argument": (
        "@hookimpl\ndef nshtrainer_run_metadata(cfg): return {}",
        r"nshtrainer_run_metadata.*cfg",
    ),
    "an argument too many": (
        "@hookimpl\ndef nshtrainer_run_metadata(config, trainer): return {}",
        r"nshtrainer_run_metadata.*trainer",
    ),
    "keyword-only": (
        "@hookimpl\ndef nshtrainer_run_metadata(*, config): return {}",
        r"'nshtrainer_run_metadata' has keyword-only arguments.*remove the `\*`",
    ),
    "async": (
        "@hookimpl\nasync def nshtrainer_run_metadata(config): return {}",
        "'nshtrainer_run_metadata' is an `async def`, which nobody awaits",
    ),
    "async generator": (
        "@hookimpl\nasync def nshtrainer_run_metadata(config): yield",
        "'nshtrainer_run_metadata' is an `async def`, which nobody awaits",
    ),
    "generator": (
        "@hookimpl\ndef nshtrainer_validate_config(config):\n    yield\n    raise ValueError",
        "'nshtrainer_validate_config' has a `yield`, .*use `return`",
    ),
}


@pytest.mark.parametrize(("body", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_an_implementation_that_would_never_be_called_is_reported(
    nshtrainer_plugins: PluginEnvironment, caplog: pytest.LogCaptureFixture, body: str, says: str
):
    """Loading names distribution, hook and fault; the other plugins go on, the broken one is out."""
    hooks(nshtrainer_plugins, "acme-hooks", "from nshtrainer import hookimpl\n" + body)
    hooks(nshtrainer_plugins, "other-hooks", GOOD)

    with caplog.at_level(logging.WARNING, logger="nshtrainer"):
        answers = ask()

    (entry,) = manifest().of(HOOKS)["acme_hooks"]
    state = plugin_manager.state(entry)
    assert answers["other-hooks"] == {"from": "other_hooks"}
    assert "acme-hooks" not in answers
    assert (state.kind, state.stage) == ("broken", "hooks")
    assert plugin_manager.implementations(entry) == []
    (record,) = [r.getMessage() for r in caplog.records if "acme" in r.getMessage()]
    assert "'acme_hooks' of acme-hooks 1.0 (acme_hooks) has hooks that cannot be used" in record
    assert "repair or uninstall acme-hooks" in record
    with pytest.raises(PluginContractError, match=says):
        plugin_manager.register(sys.modules["acme_hooks"], "by hand")


def test_a_refused_implementation_leaves_nothing_behind(nshtrainer_plugins: PluginEnvironment):
    """Of a module with a good and a bad implementation, the good one is not called either."""
    wrong = "@hookimpl\ndef nshtrainer_validate_config(cfg): pass\n"
    hooks(nshtrainer_plugins, "half-good", GOOD + wrong)

    assert "half-good" not in ask()
    assert not plugin_manager.pluggy.has_plugin("half-good:half_good")


def test_a_hook_module_is_imported_at_the_first_call(nshtrainer_plugins: PluginEnvironment):
    """Installing a plugin costs nothing until a hook is called."""
    hooks(nshtrainer_plugins, "lazy-hooks", GOOD)
    TrainerConfig()
    before = "lazy_hooks" in sys.modules
    ask()

    assert not before
    assert "lazy_hooks" in sys.modules


@pytest.mark.parametrize(
    "source",
    ["raise RuntimeError('boom')", "import no_such_module", "1 +", "import sys; sys.exit(3)"],
)
def test_a_module_that_cannot_be_imported_stops_nobody(
    nshtrainer_plugins: PluginEnvironment, caplog: pytest.LogCaptureFixture, source: str
):
    """It is logged once with its distribution; every later call goes on without it."""
    hooks(nshtrainer_plugins, "a-broken", source)
    hooks(nshtrainer_plugins, "b-good", GOOD)

    with caplog.at_level(logging.WARNING, logger="nshtrainer"):
        first, second = ask(), ask()

    assert first == second
    assert "b-good" in first
    assert len([r for r in caplog.records if "a-broken" in r.getMessage()]) == 1


def test_a_hook_that_raises_is_logged_and_the_others_run(
    nshtrainer_plugins: PluginEnvironment, caplog: pytest.LogCaptureFixture
):
    """The failure is the plugin's state from then on; strict mode makes it an exception."""
    hooks(nshtrainer_plugins, "a-fails", FAILS)
    hooks(nshtrainer_plugins, "b-good", GOOD)

    with caplog.at_level(logging.WARNING, logger="nshtrainer"):
        answers = ask()

    (entry,) = manifest().of(HOOKS)["a_fails"]
    assert "b-good" in answers
    assert "a-fails" not in answers
    assert (
        "plugin a-fails failed in nshtrainer_run_metadata and is left out: no disk" in caplog.text
    )
    assert plugin_manager.state(entry).stage == "call"


@pytest.mark.parametrize(
    ("raises", "said"),
    [
        ("SystemExit(3)", r"SystemExit\(3\)"),
        ("__import__('asyncio').CancelledError()", r"CancelledError\(\)"),
        ("StopIteration(4)", "4"),
        ("GeneratorExit()", r"GeneratorExit\(\)"),
    ],
)
def test_a_hook_cannot_end_the_program(
    nshtrainer_plugins: PluginEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    raises: str,
    said: str,
):
    """`sys.exit` in a hook is its plugin's failure like any other; strict mode is an error."""
    hooks(nshtrainer_plugins, "a-exits", GOOD.replace("return", f"raise {raises}; return"))
    hooks(nshtrainer_plugins, "b-good", GOOD)

    assert "b-good" in ask()
    assert re.search(
        rf"a-exits failed in nshtrainer_run_metadata and is left out: {said}", caplog.text
    )
    monkeypatch.setenv("NSHTRAINER_PLUGINS_STRICT", "1")
    with pytest.raises(PluginLoadError, match=r"'a_exits' of a-exits 1.0 .* failed in a hook"):
        ask()


def test_ctrl_c_in_a_hook_is_the_users(nshtrainer_plugins: PluginEnvironment):
    """It passes through, and is no failure of the plugin."""
    hooks(nshtrainer_plugins, "a-slow", GOOD.replace("return", "raise KeyboardInterrupt; return"))
    with pytest.raises(KeyboardInterrupt):
        ask()

    (entry,) = manifest().of(HOOKS)["a_slow"]
    assert plugin_manager.state(entry).kind == "loaded"


def test_a_wrapper_written_for_pluggy_may_yield():
    """There, `yield` is how pluggy wants it."""

    class Wrapper:
        @hookimpl(wrapper=True)
        def nshtrainer_run_metadata(self, config):
            yield
            return [{"wrapped": True}]

    plugin_manager.register(Wrapper(), "wrapper")
    try:
        assert ask(only=["wrapper"]) == {"wrapper": {"wrapped": True}}
    finally:
        plugin_manager.unregister("wrapper")


def test_strict_mode_raises_what_a_hook_raises(
    nshtrainer_plugins: PluginEnvironment, monkeypatch: pytest.MonkeyPatch
):
    """Whoever wants to know at once sets the variable."""
    hooks(nshtrainer_plugins, "a-fails", FAILS)
    monkeypatch.setenv("NSHTRAINER_PLUGINS_STRICT", "1")

    with pytest.raises(PluginLoadError, match=r"a-fails.*no disk"):
        ask()


def test_a_switched_off_plugin_is_neither_imported_nor_called(
    nshtrainer_plugins: PluginEnvironment, monkeypatch: pytest.MonkeyPatch
):
    """The state says which switch it was."""
    hooks(nshtrainer_plugins, "off-hooks", GOOD)
    monkeypatch.setenv("NSHTRAINER_DISABLE_PLUGINS", "off-hooks")
    answers = ask()

    (entry,) = manifest().of(HOOKS)["off_hooks"]
    assert "off-hooks" not in answers
    assert "off_hooks" not in sys.modules
    assert plugin_manager.state(entry).kind == "disabled"
    assert "the environment (disable)" in str(plugin_manager.state(entry))


def test_plugins_answer_in_the_order_of_their_names(nshtrainer_plugins: PluginEnvironment):
    """The order does not depend on folders or on what was installed first; `only` picks some."""
    for dist in ("z-last", "a-first", "m-middle"):
        hooks(nshtrainer_plugins, dist, GOOD)
    mine = {"z-last", "a-first", "m-middle"}

    assert [d for d in ask() if d in mine] == ["a-first", "m-middle", "z-last"]
    assert list(ask(only=["m-middle"])) == ["m-middle"]


def test_implementations_can_be_registered_by_hand_and_taken_out():
    """A notebook needs no distribution; an object's methods will do."""

    class Mine:
        @hookimpl
        def nshtrainer_run_metadata(self, config):
            return {"by": "hand"}

    plugin_manager.register(Mine(), "mine")
    during = ask()
    plugin_manager.unregister("mine")
    plugin_manager.unregister("mine")

    assert during["mine"] == {"by": "hand"}
    assert "mine" not in ask()
