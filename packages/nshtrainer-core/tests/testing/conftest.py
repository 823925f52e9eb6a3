from __future__ import annotations

from nshtrainer.testing.pytest_plugin import (
    fake_distribution,
    isolated_plugins,
    nshtrainer_plugins,
)

__all__ = ["fake_distribution", "isolated_plugins", "nshtrainer_plugins"]
