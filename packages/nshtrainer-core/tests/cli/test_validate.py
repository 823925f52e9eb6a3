"""`nshtrainer validate`: a config file is right, or one message says what is not."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from nshtrainer.cli.app import app

CONFLICT = """
from nshtrainer import hookimpl

@hookimpl
def nshtrainer_validate_config(config):
    if config.debug:
        raise ValueError("debug does not go with acme")
"""
EXPLODES = """
from typing import Literal
from pydantic import field_validator
from nshtrainer import CallbackConfigBase

class Config(CallbackConfigBase):
    name: Literal["explodes"] = "explodes"
    x: int = 1

    @field_validator("x")
    @classmethod
    def _check(cls, value):
        raise ZeroDivisionError("oops")
"""
BUILDS = """
from typing import Literal
from nshtrainer import CallbackConfigBase

class Config(CallbackConfigBase):
    name: Literal["builds"] = "builds"

    def create_callbacks(self, trainer_config):
        raise RuntimeError("cannot be built")
"""


@pytest.fixture
def validate(tmp_path):
    def run(text, *args, suffix=".yaml"):
        file = tmp_path / f"run{suffix}"
        file.write_text(text)
        return CliRunner().invoke(app, ["validate", str(file), *args])

    return run


def test_good_file_is_summed_up(validate):
    """A good file exits with 0 and says what it holds."""
    result = validate("{callbacks: [], loggers: [csv: 1]}".replace("csv: 1", "{name: csv}"))

    assert result.exit_code == 0
    assert result.stdout.startswith("ok: ")
    assert "1 logger (csv)" in result.stdout


@pytest.mark.parametrize(
    ("text", "suffix", "said"),
    [
        ("max_epochs: 3\ndebugg: true\n", ".yaml", "line 2, debugg"),
        ("max_epochs: many\n", ".yaml", "line 1, max_epochs"),
        (
            "callbacks: [{name: nobody_has_this}]\n",
            ".yaml",
            "no callback is named 'nobody_has_this'",
        ),
        ("a: [", ".yaml", "not valid YAML"),
        ('{"seed": -1}', ".json", "seed"),
        ("seed = 1", ".ini", "the suffix '.ini' names no known format"),
    ],
)
def test_bad_file_gets_one_clean_message(validate, text, suffix, said):
    """What is wrong is said on stderr with its place; the exit status is 1."""
    result = validate(text, suffix=suffix)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_json_report_has_the_error(validate):
    """With `--json` the verdict is data on stdout, good or bad."""
    good, bad = validate("seed: 1\n", "--json"), validate("seed: x\n", "--json")

    assert (good.exit_code, json.loads(good.stdout)["ok"]) == (0, True)
    assert (bad.exit_code, json.loads(bad.stdout)["ok"]) == (1, False)
    assert "seed" in json.loads(bad.stdout)["error"]


def test_missing_file_is_named(tmp_path):
    """A file that is not there is an error with its path."""
    result = CliRunner().invoke(app, ["validate", str(tmp_path / "none.yaml")])

    assert result.exit_code == 1
    assert "none.yaml: there is no such file" in result.stderr


def test_doubled_callback_is_noted(site):
    """The same callback twice is pointed out, since a run may refuse it."""
    site.callback("acme", "shiny")
    (site.cwd / "run.yaml").write_text("callbacks: [{name: shiny}, {name: shiny}]\n")

    done = site.run("validate", "run.yaml")

    assert done.returncode == 0
    assert "'shiny' stands 2 times in `callbacks`" in done.stderr


def test_validation_does_not_import_torch(site):
    """A login node can check a config: no torch, no Lightning."""
    site.callback("acme", "shiny")
    (site.cwd / "run.yaml").write_text("callbacks: [{name: shiny}]\nmax_epochs: 2\n")

    imported = site.imported_by("validate", "run.yaml")

    assert "acme" in imported
    assert not imported & {"torch", "lightning", "numpy"}


def test_plugins_find_conflicts(site):
    """A conflict that a plugin's hook finds is the verdict, with the plugin's name."""
    site.distribution("acme", "[nshtrainer.plugins]\nacme = acme\n", {"acme": CONFLICT})
    (site.cwd / "good.yaml").write_text("debug: false\n")
    (site.cwd / "bad.yaml").write_text("debug: true\n")

    assert site.run("validate", "good.yaml").returncode == 0
    done = site.run("validate", "bad.yaml")
    assert done.returncode == 1
    assert "contradicts itself: acme: debug does not go with acme" in done.stderr


def test_exploding_validator_is_no_traceback(site):
    """A plugin's validator that raises anything gives one message, never a traceback."""
    entry = "[nshtrainer.callbacks]\nexplodes = explodes:Config\n"
    site.distribution("explodes", entry, {"explodes": EXPLODES})
    (site.cwd / "run.yaml").write_text("callbacks: [{name: explodes, x: 2}]\n")

    done = site.run("validate", "run.yaml")

    assert done.returncode == 1
    assert "ZeroDivisionError: oops" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_build_finds_what_only_building_shows(site):
    """`--build` makes the callbacks, so a config that validates but cannot be built is found."""
    entry = "[nshtrainer.callbacks]\nbuilds = builds:Config\n"
    site.distribution("builds", entry, {"builds": BUILDS})
    (site.cwd / "run.yaml").write_text(
        "checkpoint_saving: false\nlr_monitor: false\nlog_epoch: false\n"
        "auto_set_debug_flag: false\ncallbacks: [{name: builds}]\n"
    )

    plain, built = site.run("validate", "run.yaml"), site.run("validate", "run.yaml", "--build")

    assert plain.returncode == 0
    assert built.returncode == 1
    assert "cannot be built" in built.stderr
    assert "Traceback" not in built.stderr


OWN = """
from typing import Literal
from nshtrainer import CallbackConfigBase

class Config(CallbackConfigBase):
    name: Literal["own"] = "own"
"""


@pytest.mark.parametrize(
    ("callbacks", "status"),
    [
        ("[{name: own}, {name: own}]", 1),
        ("[{name: own}, {name: own, label: second}]", 0),
        ("[{name: own}, {name: own, metadata: {ignore_if_exists: true}}]", 0),
    ],
    ids=["twice", "told apart", "may give way"],
)
def test_our_own_callback_twice_is_refused(site, callbacks, status):
    """A run takes one callback of each identity, which for ours is known without building them."""
    entry = "[nshtrainer.callbacks]\nown = own_config:Config\n"
    site.distribution("nshtrainer-monitoring", entry, {"own_config": OWN}, version="9.0")
    (site.cwd / "run.yaml").write_text(f"callbacks: {callbacks}\n")

    done = site.run("validate", "run.yaml")

    assert done.returncode == status, done.stderr
    assert ("'own' stands 2 times in `callbacks`; remove one" in done.stderr) == bool(status)
