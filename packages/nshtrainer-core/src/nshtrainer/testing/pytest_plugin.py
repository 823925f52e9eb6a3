"""Fixtures for tests of plugins.

Switch them on with `pytest_plugins = ["nshtrainer.testing.pytest_plugin"]` in the top `conftest.py`,
or import the fixtures into any `conftest.py`. None is used by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .plugins import PluginEnvironment

__all__ = ["fake_distribution", "isolated_plugins", "nshtrainer_plugins"]


@pytest.fixture
def nshtrainer_plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginEnvironment]:
    """An environment in which plugins can be installed; everything is undone after the test."""
    from .plugins import plugin_environment

    with plugin_environment(tmp_path_factory.mktemp("plugins")) as environment:
        yield environment


@pytest.fixture
def fake_distribution(nshtrainer_plugins: PluginEnvironment) -> Callable[..., Path]:
    """Installs a distribution for the length of the test; see `PluginEnvironment.fake_distribution`.

        fake_distribution(
            "acme",
            {"nshtrainer.callbacks": "acme = acme:AcmeConfig"},
            modules={"acme": "..."},
        )

    What is installed twice in one test is an error.
    """
    return nshtrainer_plugins.fake_distribution


@pytest.fixture
def isolated_plugins(nshtrainer_plugins: PluginEnvironment) -> Callable[..., None]:
    """Lets only the named distributions be used: `isolated_plugins("acme")`, or nothing but core."""
    nshtrainer_plugins.only()
    return nshtrainer_plugins.only
