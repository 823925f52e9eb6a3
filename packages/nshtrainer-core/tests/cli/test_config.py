"""`nshtrainer config`: a file to start from that says everything and changes nothing."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from nshtrainer.cli.app import app
from nshtrainer.cli.commented import commented_yaml
from nshtrainer.field_docs import field_docs
from nshtrainer.trainer.config import TrainerConfig

NEEDS = """
from typing import Literal
from nshtrainer import CallbackConfigBase

class Config(CallbackConfigBase):
    name: Literal["needs"] = "needs"
    threshold: float
    '''Above which it acts.'''
    mode: str = "a: b"
"""


def invoke(*args):
    return CliRunner().invoke(app, ["config", *args])


def test_output_reads_back_as_the_defaults():
    """Reading the file gives exactly the configuration that one gets without a file."""
    result = invoke()

    assert result.exit_code == 0
    assert TrainerConfig.from_text(result.stdout) == TrainerConfig()


def test_every_field_is_there_with_its_documentation():
    """Each field stands at the left margin, below its own documentation."""
    lines = invoke().stdout.splitlines()

    for name in TrainerConfig.model_fields:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        comment = at
        while lines[comment - 1].startswith("#"):
            comment -= 1
        said = " ".join(line.removeprefix("# ") for line in lines[comment:at])
        assert said == " ".join(field_docs(TrainerConfig)[name].split())


@pytest.mark.parametrize(
    "values",
    [
        {"notes": ["a: b", "# not a comment", "line\nbreak", "yes", "", "long " * 60]},
        {"meta": {"deep": {"list": [1, [2.5, {"x": None}]], "empty": {}}, "n": 1e-7}},
        {"loggers": []},
        {"loggers": [{"name": "csv"}, {"name": "tensorboard", "priority": 2}]},
        {"primary_metric": {"name": "val/loss", "mode": "min"}, "gradient_clip_val": 0.5},
        {"max_time": "01:02:03:04", "limit_val_batches": 0.25, "devices": [0, 1]},
    ],
)
def test_any_configuration_survives_the_comments(values):
    """Whatever a configuration says, the commented text reads back as the same."""
    config = TrainerConfig.model_validate(values)

    assert TrainerConfig.from_text(commented_yaml(config)) == config


def test_schema_line_comes_first():
    """`--schema` names the schema in the form that editors look for, in the first line."""
    result = invoke("--schema", "./schema.json")

    assert result.stdout.splitlines()[0] == "# yaml-language-server: $schema=./schema.json"
    assert TrainerConfig.from_text(result.stdout) == TrainerConfig()


def test_with_adds_a_logger_once():
    """`--with` appends a logger; one that is there by default is not doubled."""
    config = TrainerConfig.from_text(invoke("--with", "tensorboard", "--with", "csv").stdout)

    assert sorted(logger.name for logger in config.loggers) == ["csv", "tensorboard"]


def test_with_adds_a_callback_with_values(site):
    """`--with NAME:FIELD=VALUE` gives what has no default; nested comments are indented."""
    site.distribution("needs", "[nshtrainer.callbacks]\nneeds = needs:Config\n", {"needs": NEEDS})

    bare = site.run("config", "--with", "needs")
    done = site.run("config", "--with", "needs:threshold=1e-4", "--out", "run.yaml")

    assert bare.returncode == 1
    assert "write --with needs:threshold=VALUE" in bare.stderr
    assert done.returncode == 0
    text = (site.cwd / "run.yaml").read_text()
    assert re.search(r"^    # Above which it acts\.\n    threshold: 0\.0001$", text, re.M)
    assert site.run("validate", "run.yaml").returncode == 0


def test_with_fills_a_slot(site):
    """A callback that has a slot goes there, by the name of the slot or of the callback."""
    source = NEEDS.replace("needs", "norm_logging").replace(
        "threshold: float", "threshold: float = 1.0"
    )
    entry = "[nshtrainer.callbacks]\nnorm_logging = acme_norms:Config\n"
    site.distribution("acme", entry, {"acme_norms": source})

    for name in ("norm_logging", "log_norms"):
        done = site.run("config", "--with", name, NSHTRAINER_PREFER="norm_logging=acme")
        assert done.returncode == 0, done.stderr
        assert "\nlog_norms:\n  name: norm_logging\n" in done.stdout


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("nobody_has_this", "no callback is named 'nobody_has_this'"),
        ("csv:flush", "'flush' is no assignment; write NAME:FIELD=VALUE"),
        ("csv:priority=high", "priority"),
    ],
)
def test_what_cannot_be_added_is_a_clean_error(wanted, said):
    """A wrong `--with` says what is wrong with it, without a traceback."""
    result = invoke("--with", wanted)

    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_an_existing_file_is_kept(tmp_path):
    """A file that somebody edited is replaced only with `--force`."""
    file = tmp_path / "run.yaml"
    file.write_text("debug: true\n")

    refused = invoke("--out", str(file))
    kept = file.read_text()
    forced = invoke("--out", str(file), "--force")

    assert (refused.exit_code, kept) == (1, "debug: true\n")
    assert "replace it with --force" in refused.stderr
    assert forced.exit_code == 0
    assert TrainerConfig.from_file(file) == TrainerConfig()


def test_only_yaml_has_comments(tmp_path):
    """Another suffix is refused, for want of comments there."""
    result = invoke("--out", str(tmp_path / "run.json"))

    assert result.exit_code == 1
    assert "comments need YAML" in result.stderr
