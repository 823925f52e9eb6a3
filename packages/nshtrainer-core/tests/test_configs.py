"""`nshtrainer.configs`: every class by its name, and no plugin in the way of another."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

from nshtrainer import PluginLoadError, configs

if TYPE_CHECKING:
    from nshtrainer.testing import PluginEnvironment


@pytest.fixture
def broken(nshtrainer_plugins: PluginEnvironment) -> str:
    """The class name of a plugin that fails to import, of which nobody has been told yet."""
    configs._warn_once.cache_clear()
    nshtrainer_plugins.fake_distribution(
        "broken-plugin",
        {"nshtrainer.callbacks": {"broken": "broken_plugin:BrokenPluginConfig"}},
        modules={"broken_plugin": "1 / 0"},
    )
    return "BrokenPluginConfig"


def test_a_star_import_leaves_out_what_does_not_load_and_says_so(
    broken: str, caplog: pytest.LogCaptureFixture
):
    """The other classes are there; one warning names the class, its distribution and the reason."""
    names: dict[str, Any] = {}
    with caplog.at_level(logging.WARNING, logger="nshtrainer"):
        exec("from nshtrainer.configs import *", names)  # noqa: S102 -- only a module may have it

    (said,) = [r.getMessage() for r in caplog.records if broken in r.getMessage()]
    assert names["TrainerConfig"] is configs.TrainerConfig
    assert "CSVLoggerConfig" in names
    assert broken not in names
    assert f"{broken} is left out of nshtrainer.configs: 'broken' of broken-plugin 1.0" in said
    assert "ZeroDivisionError" in said


def test_looking_around_is_possible_beside_a_broken_plugin(broken: str):
    """`dir` and `inspect.getmembers` give what can be had; asking for the broken one says why not."""
    assert broken not in dir(configs)
    assert "CSVLoggerConfig" in dict(inspect.getmembers(configs))
    with pytest.raises(PluginLoadError, match=r"broken-plugin 1\.0 .*failed to import"):
        getattr(configs, broken)


def test_a_misspelt_name_loads_no_plugin(broken: str):
    """The message lists what there is, by the manifest alone."""
    with pytest.raises(AttributeError, match=rf"no attribute 'Nobody'; it has .*{broken}"):
        _ = configs.Nobody

    assert "broken_plugin" not in sys.modules
    (entry,) = configs._providers()[broken]
    assert configs._REGISTRIES[entry.group].state(entry).kind == "available"
