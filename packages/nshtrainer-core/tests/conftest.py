"""Fixtures of the core's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment

pytest_plugins = ["nshtrainer.testing.pytest_plugin"]


@pytest.fixture
def clean_registry(nshtrainer_plugins: PluginEnvironment) -> None:
    """What a test registers by decorator is gone after it."""
