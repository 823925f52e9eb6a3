"""Fake distributions are real to importlib, and gone without a trace afterwards."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nshtrainer import callback_registry, manifest
from nshtrainer.errors import DuplicateNameError, PluginLoadError
from nshtrainer.loggers.base import logger_registry
from nshtrainer.plugins.hooks import plugin_manager
from nshtrainer.plugins.manifest import HOOKS
from nshtrainer.testing import plugin_environment

ACME = {"nshtrainer.callbacks": "acme = acme.config:AcmeConfig"}
SOURCE = {
    "acme": "",
    "acme.config": """
        from typing import Literal
        from nshtrainer import CallbackConfigBase, callback_registry

        @callback_registry.register
        class AcmeConfig(CallbackConfigBase):
            "From a fake distribution."
            name: Literal["acme"] = "acme"
    """,
}


def test_a_fake_distribution_is_installed_like_a_real_one(fake_distribution):
    """Its class is found by name, and importlib knows its version and requirements."""
    info = fake_distribution("acme-x", ACME, modules=SOURCE, version="2.3", requires=["torch>=2"])

    assert callback_registry["acme"].__module__ == "acme.config"
    assert importlib.metadata.version("acme-x") == "2.3"
    assert importlib.metadata.requires("acme-x") == ["torch>=2"]
    files = importlib.metadata.files("acme-x") or []
    assert {"acme/config.py", f"{info.name}/METADATA"} <= {f.as_posix() for f in files}


def test_nothing_is_left_after_the_environment(tmp_path: Path):
    """Path, modules, registrations, hooks and switches are as before."""
    switches = {k: v for k, v in os.environ.items() if k.startswith("NSHTRAINER_")}
    before = (list(sys.path), manifest(), set(sys.modules), callback_registry.names(), switches)
    hooks = {**ACME, HOOKS: "acme = acme_hooks"}
    source = """
        import nshtrainer

        @nshtrainer.hookimpl
        def nshtrainer_run_metadata(config):
            return {"seen": True}
    """
    with plugin_environment(tmp_path) as environment:
        environment.fake_distribution("acme", hooks, modules={**SOURCE, "acme_hooks": source})
        environment.only("acme")
        assert "acme" in callback_registry
        found = plugin_manager.call("nshtrainer_run_metadata", config=None)
        assert ("acme", {"seen": True}) in found

    switches = {k: v for k, v in os.environ.items() if k.startswith("NSHTRAINER_")}
    after = (list(sys.path), manifest(), set(sys.modules), callback_registry.names(), switches)
    assert after == before
    assert "acme" not in callback_registry
    assert not plugin_manager.pluggy.has_plugin("acme:acme")


def test_the_same_name_can_be_installed_again_with_other_content(tmp_path: Path):
    """A second environment sees its own module, not the first one's."""
    for number in ("one", "two"):
        source = SOURCE["acme.config"].replace("From a fake distribution.", number)
        with plugin_environment(tmp_path / number) as environment:
            environment.fake_distribution("acme", ACME, modules={**SOURCE, "acme.config": source})
            assert callback_registry["acme"].__doc__ == number


def test_a_registration_under_a_real_name_is_undone(tmp_path: Path):
    """A fake that clashes with an installed name does so only inside."""
    real = logger_registry["csv"]
    with plugin_environment(tmp_path) as environment:
        environment.fake_distribution("acme", {"nshtrainer.loggers": {"csv": "acme:Fake"}})
        with pytest.raises(DuplicateNameError, match="acme"):
            _ = logger_registry["csv"]

    assert logger_registry["csv"] is real


def test_isolated_plugins_lets_only_the_named_ones_be_used(fake_distribution, isolated_plugins):
    """Others are there and switched off; core always works."""
    fake_distribution("acme", ACME, modules=SOURCE)
    with pytest.raises(PluginLoadError, match="switched off"):
        _ = callback_registry["acme"]

    isolated_plugins("acme")

    assert "acme" in callback_registry
    assert "csv" in logger_registry


def test_malformed_entry_points_are_written_as_they_are(fake_distribution):
    """Faults of real distributions can be reproduced; they hurt nobody else."""
    fake_distribution("broken", "[nshtrainer.callbacks\nacme = = x\n")
    fake_distribution("acme", ACME, modules=SOURCE)

    assert "acme" in callback_registry


def test_importing_the_kit_needs_neither_torch_nor_pytest():
    """The kit's package and its pytest plugin are light until something is used."""
    code = (
        "import sys, nshtrainer.testing as t; dir(t); t.plugin_environment\n"
        "bad = {'torch', 'lightning', 'numpy', 'pytest'} & set(sys.modules)\n"
        "import nshtrainer.testing.pytest_plugin\n"
        "bad |= {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
        "print(sorted(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_kit_exports_what_it_says():
    """Every name of `__all__` can be had, and an unknown one is an AttributeError."""
    from nshtrainer import testing

    assert all(getattr(testing, name) is not None for name in testing.__all__)
    assert testing.__all__ == sorted(testing.__all__)
    with pytest.raises(AttributeError, match="no_such"):
        _ = testing.no_such
