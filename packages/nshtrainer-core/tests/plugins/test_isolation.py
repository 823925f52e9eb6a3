"""One plugin's fault is its own: what is broken is named, everything else works."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import pytest
from pydantic import ValidationError

from nshtrainer import (
    CallbackConfigBase,
    TrainerConfig,
    callback_registry,
    manifest,
    plugin_manager,
)
from nshtrainer.plugins.manifest import _warn_about_unknown_switches

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment

GOOD = """
from typing import Literal
from nshtrainer import CallbackConfigBase, TrainerConfig

class GoodConfig(CallbackConfigBase):
    name: Literal["good"] = "good"
    strength: int = 1

    def create_callbacks(self, trainer_config):
        return ()
"""

BROKEN_MODULES = {
    "import_error": "import a_module_that_does_not_exist",
    "syntax_error": "def broken(:",
    "raises": "raise RuntimeError('boom')",
    "exits": "import sys; sys.exit(3)",
    "unavailable": "from nshtrainer import PluginUnavailable\nraise PluginUnavailable('needs a GPU')",
    "no_attribute": "Other = 1",
    "not_a_class": "Config_ = 3",
    "not_a_config": "class Config_: pass",
    "no_name": "from nshtrainer import CallbackConfigBase\nclass Config_(CallbackConfigBase): pass",
    "other_name": (
        "from typing import Literal\nfrom nshtrainer import CallbackConfigBase\n"
        "class Config_(CallbackConfigBase):\n    name: Literal['something_else'] = 'something_else'"
    ),
    "half_made": (
        "from typing import Literal\nfrom nshtrainer import CallbackConfigBase, callback_registry\n"
        "@callback_registry.register\nclass Half(CallbackConfigBase):\n"
        "    name: Literal['half'] = 'half'\nraise ValueError('too late')"
    ),
    "bad_field": (
        "from nshtrainer import CallbackConfigBase\nclass Config_(CallbackConfigBase):\n    x: 'Nonsense[' = 1"
    ),
    "recursion": "def f(): f()\nf()",
    "zero_division": "1 / 0",
    "key_error": "{}['x']",
    "type_error": "len(3)",
    "assertion": "assert False, 'no'",
    "os_error": "open('/does/not/exist')",
    "unicode": "b'\\xff'.decode()",
    "memory": "raise MemoryError('none left')",
    "skipped": "import pytest\npytest.importorskip('a_module_that_does_not_exist')",
    "cancelled": "import asyncio\nraise asyncio.CancelledError",
    "lazy_import": "def __getattr__(name): import a_module_that_does_not_exist",
    "lazy_raises": "def __getattr__(name): raise RuntimeError('boom')",
    "lazy_unavailable": (
        "from nshtrainer import PluginUnavailable\n"
        "def __getattr__(name): raise PluginUnavailable('needs a GPU')"
    ),
    "type_only": (
        "from typing import TYPE_CHECKING, Literal\nfrom nshtrainer import CallbackConfigBase\n"
        "if TYPE_CHECKING:\n    from torch import Tensor\n"
        "class Config_(CallbackConfigBase):\n    name: Literal['type_only'] = 'type_only'\n"
        "    start: 'Tensor | None' = None"
    ),
}


def install(
    folder: Path,
    dist: str,
    entries: dict[str, dict[str, str]],
    version: str = "1.0",
    requires: str = "",
) -> None:
    """Write a real `dist-info` folder, as an installer does."""
    info = folder / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    require = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n{require}"
    )
    lines = []
    for group, points in entries.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(code: str, *folders: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a fresh interpreter that sees the distributions in *folders*."""
    import os

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **env}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def many_broken(tmp_path: Path) -> Path:
    """A folder with every kind of broken distribution and one good one."""
    for name, body in BROKEN_MODULES.items():
        (tmp_path / f"broken_{name}.py").write_text(body)
        install(
            tmp_path,
            f"broken-{name}".replace("_", "-"),
            {"nshtrainer.callbacks": {name: f"broken_{name}:Config_"}},
        )
    (tmp_path / "good_plugin.py").write_text(GOOD)
    install(tmp_path, "good-plugin", {"nshtrainer.callbacks": {"good": "good_plugin:GoodConfig"}})
    return tmp_path


def test_broken_plugins_hurt_only_who_uses_them(many_broken: Path):
    """Importing, the other plugins and unrelated configs work; each broken one is a clear error."""
    done = run(
        """
        import json
        from pydantic import ValidationError
        from nshtrainer import TrainerConfig, callback_registry, manifest
        ok = TrainerConfig(callbacks=[{"name": "good", "strength": 2}]).callbacks[0].strength
        errors = {}
        for entry in manifest():
            if entry.dist.startswith("broken-"):
                try:
                    TrainerConfig(callbacks=[{"name": entry.name}])
                except ValidationError as error:
                    errors[entry.name] = [error.errors()[0]["type"], error.errors()[0]["msg"]]
        print(json.dumps({"ok": ok, "errors": errors, "half": "half" in callback_registry.names()}))
        """,
        many_broken,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] == 2
    assert set(found["errors"]) == set(BROKEN_MODULES)
    assert not found["half"]  # the registration that was made before the failure is undone
    for name, (kind, message) in found["errors"].items():
        dist = f"broken-{name}".replace("_", "-")
        assert dist in message
        if name.endswith("unavailable"):
            assert kind == "plugin_unavailable"
            assert "needs a GPU" in message
        else:
            assert kind == "plugin_broken", (name, kind)
            assert "reinstall" in message or "repair or uninstall" in message


def test_ctrl_c_while_a_plugin_is_imported_is_the_users(nshtrainer_plugins: PluginEnvironment):
    """It is no fault of the plugin: it ends the program, and the plugin can be used after."""
    nshtrainer_plugins.fake_distribution(
        "slow-plugin",
        {"nshtrainer.callbacks": {"slow": "slow_plugin:SlowConfig"}},
        modules={"slow_plugin": "raise KeyboardInterrupt"},
    )
    with pytest.raises(KeyboardInterrupt):
        callback_registry.get("slow")

    (entry,) = manifest().of("nshtrainer.callbacks")["slow"]
    assert callback_registry.state(entry).kind == "available"


def test_an_annotation_that_exists_for_checkers_only_is_named(
    nshtrainer_plugins: PluginEnvironment,
):
    """The state has the class, the missing name and what to do, not pydantic's advice."""
    nshtrainer_plugins.fake_distribution(
        "acme-types",
        {"nshtrainer.callbacks": {"type_only": "acme_types:Config_"}},
        modules={"acme_types": BROKEN_MODULES["type_only"]},
    )

    with pytest.raises(
        ValidationError,
        match=r"acme-types 1\.0 .*annotation of Config_ names 'Tensor'.*outside `if TYPE_CHECKING`",
    ):
        TrainerConfig(callbacks=[{"name": "type_only"}])
    (entry,) = manifest().of("nshtrainer.callbacks")["type_only"]
    assert (callback_registry.state(entry).kind, callback_registry.state(entry).stage) == (
        "broken",
        "type",
    )


def test_no_plugin_is_imported_before_its_name_is_used(many_broken: Path):
    """Validating `name: good` leaves only that plugin's module in `sys.modules`."""
    done = run(
        """
        import sys
        from nshtrainer import TrainerConfig
        before = sorted(m for m in sys.modules if m.startswith(("broken_", "good_")))
        TrainerConfig(callbacks=[{"name": "good"}])
        after = sorted(m for m in sys.modules if m.startswith(("broken_", "good_")))
        print(before, after)
        """,
        many_broken,
    )

    assert done.stdout.split("\n")[0] == "[] ['good_plugin']", done.stderr


def test_strict_mode_turns_a_broken_plugin_into_an_exception(many_broken: Path):
    """`NSHTRAINER_PLUGINS_STRICT=1` raises where otherwise the state is recorded."""
    code = """
        from nshtrainer import TrainerConfig
        TrainerConfig(callbacks=[{"name": "raises"}])
        """
    done = run(code, many_broken, NSHTRAINER_PLUGINS_STRICT="1")

    assert done.returncode == 1
    assert "PluginLoadError: 'raises' of broken-raises 1.0" in done.stderr


def test_malformed_metadata_of_any_distribution_hides_nobody_else(tmp_path: Path):
    """A line without `=`, and bytes that are no UTF-8, are the problem of their own distribution."""
    (tmp_path / "good_plugin.py").write_text(GOOD)
    install(tmp_path, "good-plugin", {"nshtrainer.callbacks": {"good": "good_plugin:GoodConfig"}})
    for dist, text in (
        ("bad-line", b"[nshtrainer.callbacks]\nno equals sign\n"),
        ("bad-bytes", b"[x]\n\xff = \xfe\n"),
    ):
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_bytes(text)
    leftover = tmp_path / "good_plugin-0.9.dist-info"  # an interrupted uninstall
    leftover.mkdir()
    done = run(
        """
        from nshtrainer import TrainerConfig, manifest
        print(TrainerConfig(callbacks=[{"name": "good"}]).callbacks[0].strength)
        print(sorted(dist for dist, _ in manifest().problems))
        """,
        tmp_path,
        PYDANTIC_DISABLE_PLUGINS="1",  # pydantic's own scan is not guarded
    )

    assert done.stdout.splitlines() == ["1", "['bad_bytes', 'bad_line']"], done.stderr


def test_two_distributions_with_one_name_clash_until_one_is_preferred(tmp_path: Path):
    """Neither wins; the error has both; the environment or the config's `prefer` decides."""
    for who in ("alpha", "beta"):
        (tmp_path / f"{who}_plugin.py").write_text(
            GOOD.replace('"good"', '"shared"').replace("strength: int = 1", f"who: str = {who!r}")
        )
        install(
            tmp_path,
            f"{who}-plugin",
            {"nshtrainer.callbacks": {"shared": f"{who}_plugin:GoodConfig"}},
        )
    code = """
        import sys
        from nshtrainer import TrainerConfig, TrainerConfig as T
        kwargs = {"plugins": {"prefer": {"shared": sys.argv[1]}}} if len(sys.argv) > 1 else {}
        try:
            print(T(callbacks=[{"name": "shared"}], **kwargs).callbacks[0].who)
        except ValueError as error:
            print(error)
        print(sorted(m for m in sys.modules if m.endswith("_plugin")))
        """
    clash = run(code, tmp_path)
    by_environment = run(code, tmp_path, NSHTRAINER_PREFER="shared=beta_plugin")
    by_config = run(
        code.replace("sys.argv[1]", "'alpha-plugin'").replace("len(sys.argv) > 1", "True"), tmp_path
    )

    assert "'shared' is provided by alpha-plugin 1.0" in clash.stdout
    assert "and by beta-plugin 1.0" in clash.stdout
    assert "NSHTRAINER_PREFER=shared=DISTRIBUTION" in clash.stdout
    assert clash.stdout.splitlines()[-1] == "[]"
    assert by_environment.stdout.splitlines()[0] == "beta", by_environment.stderr
    assert by_config.stdout.splitlines()[0] == "alpha", by_config.stderr


def test_a_re_export_and_a_decorator_on_the_same_class_are_no_clash(tmp_path: Path):
    """Identity is the loaded class, not the text of the entry point."""
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "__init__.py").write_text("from .config import GoodConfig")
    (tmp_path / "acme" / "config.py").write_text(
        GOOD.replace("class Good", "@callback_registry.register\nclass Good").replace(
            "CallbackConfigBase, TrainerConfig", "CallbackConfigBase, callback_registry"
        )
    )
    install(tmp_path, "acme", {"nshtrainer.callbacks": {"good": "acme:GoodConfig"}})
    done = run(
        """
        import acme.config
        from nshtrainer import TrainerConfig, callback_registry
        print(callback_registry["good"] is acme.config.GoodConfig)
        print(TrainerConfig(callbacks=[acme.config.GoodConfig(strength=4)]).callbacks[0].strength)
        """,
        tmp_path,
    )

    assert done.stdout.splitlines() == ["True", "4"], done.stderr


RE_EXPORTS = {
    "plain": ("acme.config:AcmeConfig", ""),
    "blanks and extras": ("acme.config : AcmeConfig [gpu]", ""),
    "re-export": ("acme:AcmeConfig", "from .config import AcmeConfig"),
    "other name": ("acme:Acme", "from .config import AcmeConfig as Acme"),
    "on demand": (
        "acme:AcmeConfig",
        "def __getattr__(name):\n    from . import config\n    return getattr(config, name)",
    ),
}
"""What an entry point may look like that names `acme.config:AcmeConfig`, and `acme/__init__.py`."""


@pytest.fixture(params=RE_EXPORTS.values(), ids=RE_EXPORTS.keys())
def acme(request: pytest.FixtureRequest, nshtrainer_plugins: PluginEnvironment) -> ModuleType:
    """The module `acme.config` of an installed plugin: imported, its class registered."""
    value, init = request.param
    source = GOOD.replace(
        "CallbackConfigBase, TrainerConfig", "CallbackConfigBase, callback_registry"
    )
    nshtrainer_plugins.fake_distribution(
        "acme",
        {"nshtrainer.callbacks": {"good": value}},
        modules={
            "acme": init,
            "acme.config": source.replace("class Good", "@callback_registry.register\nclass Acme"),
        },
    )
    return importlib.import_module("acme.config")


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_switched_off_plugin_that_was_imported_stays_off(
    acme: ModuleType, monkeypatch: pytest.MonkeyPatch, is_loaded: bool
):
    """Deny wins, however the entry point names the class that a decorator has registered."""
    assert not is_loaded or callback_registry["good"] is acme.AcmeConfig
    monkeypatch.setenv("NSHTRAINER_DISABLE_PLUGINS", "acme")

    for entry in ({"name": "good"}, acme.AcmeConfig()):
        with pytest.raises(ValidationError, match="'good' of acme is switched off"):
            TrainerConfig(callbacks=[entry])


def test_ones_own_class_may_take_the_place_of_a_switched_off_plugin(
    acme: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Only the plugin's class is off: the name is free for another."""
    monkeypatch.setenv("NSHTRAINER_DISABLE_PLUGINS", "acme")
    callback_registry.unregister("good")

    @callback_registry.register
    class Mine(CallbackConfigBase):
        name: Literal["good"] = "good"

    assert type(TrainerConfig(callbacks=[{"name": "good"}]).callbacks[0]) is Mine


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_reloaded_plugin_does_not_clash_with_itself(acme: ModuleType, is_loaded: bool):
    """The newest class counts, however the entry point names it; instances of the old one go over."""
    old = callback_registry["good"] if is_loaded else acme.AcmeConfig
    held = old(strength=7)
    acme = importlib.reload(acme)

    config = TrainerConfig(callbacks=[held, {"name": "good"}])

    assert callback_registry["good"] is acme.AcmeConfig is not old
    assert [type(c) for c in config.callbacks] == [acme.AcmeConfig] * 2
    assert config.callbacks[0].strength == 7
    assert callback_registry.entry_of(acme.AcmeConfig).dist == "acme"


def test_a_plugin_that_was_mended_is_usable_without_a_restart(
    nshtrainer_plugins: PluginEnvironment,
):
    """Registering a class of the name again makes the registry look at the plugin again."""
    wrong, right = BROKEN_MODULES["type_only"], "from torch import Tensor"
    module = wrong.replace("class", "@callback_registry.register\nclass", 1)
    module = module.replace(
        "import CallbackConfigBase", "import CallbackConfigBase, callback_registry"
    )
    nshtrainer_plugins.fake_distribution(
        "acme-types",
        {"nshtrainer.callbacks": {"type_only": "acme_types:Config_"}},
        modules={"acme_types": module},
    )
    assert "type_only" not in callback_registry
    mended = module.replace(f"    {right}", "    pass\nTensor = int")
    (nshtrainer_plugins.folder / "acme_types.py").write_text(mended + "  # longer")
    nshtrainer_plugins.refresh()
    importlib.reload(sys.modules["acme_types"])

    assert callback_registry["type_only"](start=3).start == 3


@pytest.mark.parametrize(
    ("env", "usable"),
    [
        ({}, True),
        ({"NSHTRAINER_DISABLE_PLUGINS": "good-plugin"}, False),
        ({"NSHTRAINER_DISABLE_PLUGINS": "GOOD_Plugin"}, False),
        ({"NSHTRAINER_DISABLE_PLUGINS": "good"}, False),
        ({"NSHTRAINER_DISABLE_PLUGINS": "*"}, False),
        ({"NSHTRAINER_PLUGINS": "good"}, True),
        ({"NSHTRAINER_PLUGINS": "good-plugin"}, True),
        ({"NSHTRAINER_PLUGINS": "nshtrainer-ema"}, False),
        ({"NSHTRAINER_PLUGINS": "good", "NSHTRAINER_DISABLE_PLUGINS": "good"}, False),
    ],
)
def test_switches_act_before_import_and_deny_beats_allow(
    tmp_path: Path, env: dict[str, str], usable: bool
):
    """A switched-off plugin is not imported, and using it says which switch it was."""
    (tmp_path / "good_plugin.py").write_text(GOOD)
    install(tmp_path, "good-plugin", {"nshtrainer.callbacks": {"good": "good_plugin:GoodConfig"}})
    done = run(
        """
        import sys
        from nshtrainer import TrainerConfig, logger_registry
        try:
            TrainerConfig(callbacks=[{"name": "good"}]); print("usable")
        except ValueError as error:
            print("switched off by the environment" in str(error))
        print("good_plugin" in sys.modules, logger_registry.get("csv") is not None)
        """,
        tmp_path,
        **env,
    )

    expected = ["usable", "True True"] if usable else ["True", "False True"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_the_configs_own_switches_act_on_the_config_itself(tmp_path: Path):
    """`plugins.disable` and `plugins.allow` count while the very config that has them is read."""
    (tmp_path / "good_plugin.py").write_text(GOOD)
    install(tmp_path, "good-plugin", {"nshtrainer.callbacks": {"good": "good_plugin:GoodConfig"}})
    done = run(
        """
        import warnings; warnings.simplefilter("ignore")
        from nshtrainer import TrainerConfig
        for plugins in ({"disable": ["good"]}, {"allow": ["nshtrainer-ema"]}, {"allow": ["good"]}):
            try:
                config = TrainerConfig(callbacks=[{"name": "good"}], plugins=plugins)
                config.callbacks = [{"name": "good", "strength": 3}]
                print("usable", config.callbacks[0].strength)
            except ValueError as error:
                print("switched off by the config's `plugins`" in str(error))
        """,
        tmp_path,
    )

    assert done.stdout.splitlines() == ["True", "True", "usable 3"], done.stderr


def test_a_switch_that_names_nothing_warns_with_the_nearest_name(tmp_path: Path):
    """A misspelt switch would otherwise silently switch nothing off."""
    (tmp_path / "good_plugin.py").write_text(GOOD)
    install(tmp_path, "good-plugin", {"nshtrainer.callbacks": {"good": "good_plugin:GoodConfig"}})
    warning = "'god-plugin', which is not installed; did you mean 'good-plugin'"

    code = (
        "from nshtrainer import TrainerConfig; TrainerConfig(plugins={'disable': ['god-plugin']})"
    )
    assert warning in run(code, tmp_path).stderr
    switched = run("import nshtrainer", tmp_path, NSHTRAINER_DISABLE_PLUGINS="god-plugin")
    assert warning in switched.stderr


@pytest.mark.parametrize(
    ("switch", "warning"),
    [
        ("good", "NSHTRAINER_PREFER has 'good', which is no pair; write NAME=DISTRIBUTION"),
        ("god=good-plugin", "NSHTRAINER_PREFER names 'god', which no installed plugin provides; "
                            "did you mean 'good'?"),
        ("good=bad-plugin", "NSHTRAINER_PREFER takes 'good' from 'bad-plugin', which does not provide "
                            "it; good-plugin does"),
        ("good=Good_Plugin", None),
    ],
)  # fmt: skip
def test_a_preference_that_prefers_nothing_warns(
    nshtrainer_plugins: PluginEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    switch: str,
    warning: str | None,
):
    """From the environment and from the config: what is no pair, and a name or place nobody knows."""
    nshtrainer_plugins.fake_distribution(
        "good-plugin",
        {"nshtrainer.callbacks": {"good": "good_plugin:GoodConfig"}},
        modules={"good_plugin": GOOD},
    )
    monkeypatch.setenv("NSHTRAINER_PREFER", switch)
    name, _, dist = switch.partition("=")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _warn_about_unknown_switches(manifest())
        TrainerConfig(plugins={"prefer": {name: dist}})

    said = [str(w.message) for w in caught]
    expected = [] if warning is None else [warning]
    assert said == expected + [w.replace("NSHTRAINER_PREFER", "`plugins.prefer`") for w in expected]


def test_a_distribution_without_hooks_that_should_add_defaults_warns(
    nshtrainer_plugins: PluginEnvironment,
):
    """`plugins.defaults` names a distribution; what was registered by hand counts too."""
    nshtrainer_plugins.fake_distribution(
        "acme-hooks", {"nshtrainer.plugins": {"acme": "acme_hooks"}}, modules={"acme_hooks": ""}
    )
    plugin_manager.register(ModuleType("by_hand"), "by_hand")
    try:
        TrainerConfig(plugins={"defaults": ["Acme_Hooks", "by-hand"]})
        with pytest.warns(
            match="`plugins.defaults` names 'acme-hook', .*with hooks; did you mean 'acme-hooks'"
        ):
            TrainerConfig(plugins={"defaults": ["acme-hook"]})
    finally:
        plugin_manager.unregister("by_hand")


def test_a_plugin_made_for_another_core_says_which_side_to_upgrade(tmp_path: Path):
    """When it fails and its requirement on the core is not met, that is the message."""
    (tmp_path / "old_plugin.py").write_text("from nshtrainer import SomethingThatIsGone")
    install(
        tmp_path,
        "old-plugin",
        {"nshtrainer.callbacks": {"old": "old_plugin:OldConfig"}},
        requires="nshtrainer-core>=99",
    )
    done = run(
        """
        from nshtrainer import TrainerConfig
        try:
            TrainerConfig(callbacks=[{"name": "old"}])
        except ValueError as error:
            print(error)
        """,
        tmp_path,
    )

    assert "was made for nshtrainer-core>=99 (installed: " in done.stdout


def test_required_plugins_are_checked_when_the_config_is_read():
    """`plugins.require` names the distribution and the command."""
    assert TrainerConfig(plugins={"require": ["nshtrainer-core>=0.0.1"]})
    with pytest.raises(
        ValidationError, match=r"requires acme-callbacks, which is not installed: pip install"
    ):
        TrainerConfig(plugins={"require": ["acme-callbacks"]})
    with pytest.raises(ValidationError, match=r"requires nshtrainer-core>=99, but .* is installed"):
        TrainerConfig(plugins={"require": ["nshtrainer-core>=99"]})
    with pytest.raises(ValidationError, match="is no requirement"):
        TrainerConfig(plugins={"require": ["=="]})


def test_one_scan_serves_a_whole_process(tmp_path: Path):
    """Importing, listing, validating and failing together read the metadata once."""
    done = run(
        """
        import nshtrainer
        from nshtrainer import TrainerConfig, callback_registry, logger_registry, plugin_manager
        from nshtrainer.plugins import manifest as module
        import nshtrainer.plugins.manifest as m
        callback_registry.names(), logger_registry.names(), TrainerConfig()
        try: TrainerConfig(callbacks=[{"name": "unknown"}])
        except ValueError: pass
        plugin_manager.call("nshtrainer_run_metadata", config=None)
        import sys; print(sys.modules["nshtrainer.plugins.manifest"].scan_count)
        """,
        tmp_path,
    )

    assert done.stdout.splitlines()[-1] == "1", done.stderr


def test_the_order_of_the_manifest_does_not_depend_on_the_order_of_folders(tmp_path: Path):
    """Two machines that list their folders differently have one manifest and one digest."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, dist in ((first, "zeta"), (second, "alpha")):
        install(folder, dist, {"nshtrainer.callbacks": {f"{dist}_callback": f"{dist}:X"}})
    code = "from nshtrainer import manifest; print(manifest().digest, [e.dist for e in manifest() if e.dist in ('zeta', 'alpha')])"

    one, other = run(code, first, second), run(code, second, first)

    assert one.stdout == other.stdout
    assert "['alpha', 'zeta']" in one.stdout


def test_the_monolith_beside_the_core_is_named_once(tmp_path: Path):
    """Both own the import package `nshtrainer`; the warning has the two commands."""
    install(tmp_path, "nshtrainer", {})
    done = run("import nshtrainer", tmp_path)

    assert "pip uninstall nshtrainer" in done.stderr
    assert "pip install --force-reinstall nshtrainer-core" in done.stderr


def test_an_ill_formed_entry_point_name_is_that_entrys_own_problem(tmp_path: Path):
    """`GOOD` is refused for what it is; the well-formed `good` of another distribution works."""
    for name in ("loud", "calm"):
        (tmp_path / f"{name}.py").write_text(GOOD)
    install(tmp_path, "loud", {"nshtrainer.callbacks": {"GOOD": "loud:GoodConfig"}})
    install(tmp_path, "calm", {"nshtrainer.callbacks": {"good": "calm:GoodConfig"}})
    done = run(
        """
        from nshtrainer import TrainerConfig, callback_registry
        try: TrainerConfig(callbacks=[{"name": "GOOD", "strength": 2}])
        except ValueError as error: print("a-z, 0-9 and _" in str(error))
        print(callback_registry.get("good") is not None)
        """,
        tmp_path,
    )

    assert done.stdout.splitlines() == ["True", "True"], done.stderr


def test_a_plugin_that_appears_while_the_process_runs_is_found_by_refresh(tmp_path: Path):
    """A notebook installs a plugin and goes on without a restart."""
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from nshtrainer import TrainerConfig, refresh_plugins
        from pathlib import Path
        from test_isolation import GOOD, install
        folder = Path({str(tmp_path)!r})
        try: TrainerConfig(callbacks=[{{"name": "good"}}])
        except ValueError: print("unknown")
        (folder / "good_plugin.py").write_text(GOOD)
        install(folder, "good-plugin", {{"nshtrainer.callbacks": {{"good": "good_plugin:GoodConfig"}}}})
        refresh_plugins()
        print(TrainerConfig(callbacks=[{{"name": "good"}}]).callbacks[0].strength)
        """
    done = run(code)

    assert done.stdout.splitlines() == ["unknown", "1"], done.stderr
