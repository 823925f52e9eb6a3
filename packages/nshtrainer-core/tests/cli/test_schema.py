"""`nshtrainer schema`: what editors check config files with."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from nshtrainer.cli.app import app
from nshtrainer.trainer.config import SLOTS, TrainerConfig

NO_SCHEMA = """
from typing import Any, Literal
from pydantic import PlainValidator
from typing_extensions import Annotated
from collections.abc import Callable
from nshtrainer import CallbackConfigBase

class Config(CallbackConfigBase):
    name: Literal["odd"] = "odd"
    function: Callable[[], int] | None = None
"""


@pytest.fixture(scope="module")
def document():
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_schema_says_what_it_is(document):
    """Dialect, identity and title are there for the editor."""
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["$id"].startswith("urn:nshtrainer:")
    assert document["title"]


def test_schema_covers_every_field(document):
    """Each field of a config is described, and no other is allowed."""
    assert set(document["properties"]) == {*TrainerConfig.model_fields, "$schema"}
    assert document["additionalProperties"] is False
    assert "Identifies the run" in document["properties"]["id"]["description"]


@pytest.mark.parametrize("slot", SLOTS)
def test_slots_may_be_switched_off_with_false(document, slot):
    """`false` switches a slot off in a file, so an editor must not object."""
    assert {"const": False} in document["properties"][slot]["anyOf"]
    assert getattr(TrainerConfig.from_text(f"{slot}: false\n"), slot) is None


@pytest.mark.parametrize("field", ["name", "tags", "notes"])
def test_one_text_may_stand_for_a_list(document, field):
    """A single text is accepted where a list of texts is."""
    assert {"type": "string"} in document["properties"][field]["anyOf"]
    assert getattr(TrainerConfig.from_text(f"{field}: one\n"), field) == ["one"]


def test_installed_plugins_are_part_of_it(site):
    """A third party's callback is in the schema, with its own documentation."""
    site.callback("acme", "shiny")

    done = site.run("schema")

    schema = json.loads(done.stdout)
    choices = json.dumps(schema["properties"]["callbacks"])
    assert '"shiny"' in choices
    strength = next(
        d["properties"]["strength"]
        for d in schema["$defs"].values()
        if "strength" in d["properties"]
    )
    assert strength["description"] == "How strong it is."


def test_broken_plugins_are_left_out_and_named(site):
    """A broken plugin costs only itself; stderr names it, stdout stays JSON though it prints."""
    site.callback("acme", "shiny")
    entry = "[nshtrainer.callbacks]\nbad = bad:Config\n"
    site.distribution("bad", entry, {"bad": "print('noise')\nraise RuntimeError('boom')"})

    done = site.run("schema")

    assert done.returncode == 0
    choices = json.dumps(json.loads(done.stdout)["properties"]["callbacks"])
    assert '"shiny"' in choices
    assert '"bad"' not in choices
    assert "left out of the schema: 'bad' of bad 1.0" in done.stderr


def test_classes_that_no_schema_describes_are_left_out(site):
    """A usable class with a field that JSON schema has no word for is left out and named."""
    site.callback("acme", "shiny")
    site.distribution("odd", "[nshtrainer.callbacks]\nodd = odd:Config\n", {"odd": NO_SCHEMA})

    done = site.run("schema")

    assert done.returncode == 0
    choices = json.dumps(json.loads(done.stdout)["properties"]["callbacks"])
    assert '"shiny"' in choices
    assert '"odd"' not in choices
    assert "left out of the schema: 'odd' of odd 1.0" in done.stderr


def test_out_writes_the_file(tmp_path):
    """`--out` writes the same document to a file and makes its folder."""
    file = tmp_path / "new" / "schema.json"

    result = CliRunner().invoke(app, ["schema", "--out", str(file)])

    assert result.exit_code == 0
    assert result.stdout == ""
    assert json.loads(file.read_text())["title"]


def test_unwritable_file_is_a_clean_error(tmp_path):
    """Where nothing can be written, one message says so."""
    (tmp_path / "file").write_text("")

    result = CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "file" / "s.json")])

    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
