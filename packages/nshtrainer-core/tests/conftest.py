"""Fixtures of the core's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nshtrainer import callback_registry, logger_registry

# pytest_plugins = ["nshtrainer.testing.pytest_plugin"]


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """What a test registers by decorator is gone after it."""
    before = {
        registry: ({n: dict(c) for n, c in registry._local.items()}, dict(registry._override))
        for registry in (callback_registry, logger_registry)
    }
    yield
    for registry, (local, override) in before.items():
        registry._local, registry._override = local, override
        registry._forget()
