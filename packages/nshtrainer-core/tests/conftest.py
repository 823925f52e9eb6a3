"""Fixtures of the core's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nshtrainer.testing.pytest_plugin import (
    fake_distribution,
    isolated_plugins,
    nshtrainer_plugins,
)

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment

__all__ = ["clean_registry", "fake_distribution", "isolated_plugins", "nshtrainer_plugins"]


@pytest.fixture
def clean_registry(nshtrainer_plugins: PluginEnvironment) -> None:
    """What a test registers by decorator is gone after it."""
