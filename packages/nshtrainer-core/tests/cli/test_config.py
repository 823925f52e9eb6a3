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
    names: list[str] = []
    table: dict[str, list[int]] = {}
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


def needs(site):
    """Install `needs`, and return what `config --with` gives for the values of its fields."""
    site.distribution("needs", "[nshtrainer.callbacks]\nneeds = needs:Config\n", {"needs": NEEDS})
    return lambda *wanted: site.run("config", *(f"--with={w}" for w in wanted))


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ("names=[a,b]", ["names:", "- a", "- b"]),
        (
            "table={x: [1, 2], y: []},mode=last",
            ["table:", "x:", "- 1", "- 2", "y: []", "mode: last"],
        ),
        ("""names=["a,]", 'it''s, so'],mode=x""", ["- a,]", "- it's, so", "mode: x"]),
        ("mode=it's,names=[don't]", ["mode: it's", "- don't"]),
    ],
    ids=["list", "mapping", "quotes", "apostrophes"],
)
def test_with_takes_lists_and_mappings(site, values, lines):
    """A comma in a list, a mapping or quotes does not end the value."""
    done = needs(site)(f"needs:threshold=1,{values}")

    assert done.returncode == 0, done.stderr
    written = {line.strip() for line in done.stdout.splitlines()}
    assert {line for line in lines if line not in written} == set()


def test_with_names_the_misspelt_field(site):
    """A misspelt field is told with the one that was meant, which may be missing for that reason."""
    done = needs(site)("needs:treshold=1")

    assert done.returncode == 1
    assert "treshold: there is no such field; did you mean 'threshold'?" in done.stderr


def test_with_refuses_the_same_twice(site):
    """Two of one identity would make a file that no run accepts; a label tells them apart."""
    with_ = needs(site)

    refused = with_("needs:threshold=1", "needs:threshold=2")
    told_apart = with_("needs:threshold=1", "needs:threshold=2,label=second")

    assert refused.returncode == 1
    assert "--with needs:threshold=1 gives 'needs' already" in refused.stderr
    assert refused.stdout == ""
    assert told_apart.returncode == 0, told_apart.stderr


HOOKS = """
from nshtrainer import hookimpl

@hookimpl
def nshtrainer_validate_config(config):
    raise ValueError("there is no metric")
"""


def test_what_a_run_still_needs_is_noted(site):
    """A file to start from may be incomplete; stderr says what is open, and stdout is the file alone."""
    site.distribution("acme", "[nshtrainer.plugins]\nacme = acme\n", {"acme": HOOKS})

    done = site.run("config")

    assert done.returncode == 0
    assert "note: no run can start with this yet: " in done.stderr
    assert "acme: there is no metric" in done.stderr
    assert "note:" not in done.stdout


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("csv:priority=1,priority=2", "'priority' has two values; remove one"),
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


def test_what_cannot_be_written_is_one_line(tmp_path):
    """A path that takes no file is an error that says why."""
    (tmp_path / "file").write_text("in the way")

    result = invoke("--out", str(tmp_path / "file" / "run.yaml"))

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: {tmp_path / 'file' / 'run.yaml'} cannot be written: {tmp_path / 'file'} is no folder; "
        "choose another file"
    ]
