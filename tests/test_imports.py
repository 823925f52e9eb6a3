"""What importing costs: a configuration is read without torch, and every class is found by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nshtrainer
from nshtrainer import DuplicateNameError, callback_registry, configs, logger_registry, manifest
from nshtrainer.field_docs import field_docs
from nshtrainer.plugins.catalogue import CLASSES
from nshtrainer.plugins.manifest import CALLBACKS, LOGGERS
from nshtrainer.testing.plugins import plugin_environment

RUN_TIME = {"torch", "lightning", "pytorch_lightning", "wandb", "numpy", "pandas", "sklearn"}
ON_USE = {"rich", "click", "ruamel", "tomllib", "tomli", "tomli_w"}
SCRIPT = """
import json, sys
{code}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
CONFIG_MODULES = sorted(
    {
        entry.value.partition(":")[0]
        for group in (CALLBACKS, LOGGERS)
        for es in manifest().of(group).values()
        for entry in es
    }
)


def loaded(code: str, *args: str) -> set[str]:
    """The top-level packages that a process has loaded after *code*."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT.format(code=code), *args],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import nshtrainer",
        "import nshtrainer.errors",
        "from nshtrainer import configs; configs.__all__",
        "from nshtrainer.configs import *",
        "from nshtrainer import callback_registry, logger_registry; callback_registry.load_all(); logger_registry.load_all()",
        "from nshtrainer import TrainerConfig; TrainerConfig().to_text('json')",
        'from nshtrainer import TrainerConfig; TrainerConfig.from_text(\'{"callbacks": [{"name": "ema", "decay": 0.9}]}\', \'json\')',
        "import nshtrainer; nshtrainer.plugin_manager.call('nshtrainer_run_metadata', config=nshtrainer.TrainerConfig())",
    ],
    ids=["package", "errors", "names", "every class", "registries", "config", "JSON", "hooks"],
)
def test_config_time_is_pydantic_and_nothing_heavy(code: str):
    """Neither what trains nor what formats and prints is loaded, warnings being errors."""
    assert not loaded(code) & (RUN_TIME | ON_USE)


@pytest.mark.parametrize("module", CONFIG_MODULES)
def test_each_config_module_alone_is_light(module: str):
    """A family's configuration is imported by itself, before anything else of ours."""
    assert not loaded(f"import {module}") & (RUN_TIME | ON_USE)


@pytest.mark.parametrize(
    ("suffix", "brings"), [("yaml", {"ruamel"}), ("json", set()), ("toml", {"tomllib", "tomli"})]
)
def test_a_file_brings_only_its_own_reader(tmp_path: Path, suffix: str, brings: set[str]):
    """YAML's library is loaded for YAML, TOML's for TOML, and nothing else for either."""
    path = nshtrainer.TrainerConfig().replace(meta={"a": 1}).to_file(tmp_path / f"run.{suffix}")
    found = loaded(
        "from nshtrainer import TrainerConfig; TrainerConfig.from_file(sys.argv[1])", str(path)
    )

    assert found & (RUN_TIME | ON_USE) <= brings
    assert bool(found & ON_USE) == bool(brings)


def test_the_heavy_part_comes_with_the_name_that_needs_it():
    """`nshtrainer.Trainer` is there like any other name, and brings Lightning only when it is asked for."""
    assert "lightning" in loaded("import nshtrainer; nshtrainer.Trainer")
    assert set(nshtrainer.__all__) <= set(dir(nshtrainer))
    assert all(getattr(nshtrainer, name) is not None for name in nshtrainer.__all__)


# ---- nshtrainer.configs ------------------------------------------------------------------------


def test_every_installed_config_is_found_by_its_class_name():
    """Callbacks, loggers and the core's own; `from nshtrainer.configs import *` has them all."""
    for registry in (callback_registry, logger_registry):
        for entries in manifest().of(registry.group).values():
            cls = registry[entries[0].name]
            assert getattr(configs, cls.__name__) is cls
            assert cls.__name__ in configs.__all__
    assert set(CLASSES) <= set(configs.__all__)
    assert configs.TrainerConfig is nshtrainer.TrainerConfig
    assert configs.__all__ == sorted(set(configs.__all__))


def test_every_field_of_every_installed_config_is_documented():
    """The string below a field is its description in the JSON schema, for editors and the CLI."""
    undocumented = [
        f"{name}.{field}"
        for name in configs.__all__
        for field in getattr(configs, name).model_fields
        if field != "name" and field not in field_docs(getattr(configs, name))
    ]

    assert not undocumented


def test_the_class_of_a_missing_family_says_what_to_install():
    """`from nshtrainer.configs import X` is a `ModuleNotFoundError` with the pip command."""
    code = """
import importlib_metadata
real = importlib_metadata.distributions
importlib_metadata.distributions = lambda: (d for d in real() if d.name != "nshtrainer-ema")
from nshtrainer import configs
for name in ("EMACallbackConfig", "EarlyStoppingCallbackConfig"):
    try:
        exec(f"from nshtrainer.configs import {name}")
    except ModuleNotFoundError as error:
        assert str(error) == f"{name} is provided by nshtrainer-ema, which is not installed; run `pip install nshtrainer-ema`", error
    else:
        raise AssertionError(name)
    assert name not in configs.__all__
from nshtrainer.configs import *
from nshtrainer.configs import NormLoggingCallbackConfig
"""
    assert not loaded(code) & RUN_TIME


def test_a_name_that_nobody_has_is_an_attribute_error():
    """With what there is."""
    with pytest.raises(AttributeError, match=r"no attribute 'Nobody'; it has .*EMACallbackConfig"):
        _ = configs.Nobody


def test_a_class_name_of_two_distributions_is_refused_and_left_out(tmp_path: Path):
    """Neither wins: the error names both, a star import has neither, their names still work."""
    source = """
from typing import Literal
from nshtrainer import CallbackConfigBase

class PaintConfig(CallbackConfigBase):
    name: Literal["{0}"] = "{0}"
"""
    both = r"'PaintConfig' is provided by acme 1\.0 .* and zeta 1\.0 .*from its own module"
    with plugin_environment(tmp_path) as plugins:
        for dist in ("acme", "zeta"):
            plugins.fake_distribution(
                dist,
                {CALLBACKS: f"{dist} = {dist}_paint:PaintConfig"},
                modules={f"{dist}_paint": source.format(dist)},
            )

        with pytest.raises(DuplicateNameError, match=both):
            _ = configs.PaintConfig
        assert "PaintConfig" not in configs.__all__
        assert callback_registry["acme"] is not callback_registry["zeta"]
