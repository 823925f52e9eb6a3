from __future__ import annotations

import os
import random
import re

import pytest

from nshtrainer.errors import ConfigError
from nshtrainer.run.identity import (
    RUN_ID_VARIABLE,
    folder_name,
    known_run_id,
    new_run_id,
    run_id_in_environment,
    validate_run_id,
)


def test_new_ids_are_short_distinct_and_valid():
    """Ids are 8 lower-case characters that nobody confuses and no file format reads as a number."""
    ids = {new_run_id() for _ in range(2000)}

    assert len(ids) == 2000
    for run_id in ids:
        assert re.fullmatch(r"[a-z][a-z0-9]{7}", run_id)
        assert not set(run_id) & set("01ilo")
        assert validate_run_id(run_id) == run_id


def test_seeding_neither_fixes_the_id_nor_is_disturbed():
    """Two runs with one seed get two ids, and making an id leaves the random numbers as they were."""
    random.seed(0)
    expected = random.random()  # noqa: S311 -- a comparison, no secret
    random.seed(0)
    first = new_run_id()
    drawn = random.random()  # noqa: S311 -- a comparison, no secret
    random.seed(0)

    assert drawn == expected
    assert new_run_id() != first


@pytest.mark.parametrize("run_id", ["a", "abc-123", "2024.01.02_run", "A" * 128, "_x", "console"])
def test_ordinary_ids_are_allowed(run_id: str):
    """People may name their runs."""
    assert validate_run_id(run_id) == run_id


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("", ""),
        ("my run", "my run"),
        ("lr=0.1/big: x", "lr=0.1_big_ x"),
        ("..", "_"),
        ("../a", ".._a"),
        ("a. ", "a"),
        ("con", "_con"),
        ("b" * 300, "b" * 120),
        ("\u00e9" * 100, "\u00e9" * 60),
        ("a\x00\nb", "a__b"),
    ],
)
def test_a_persons_text_becomes_one_folder(text: str, folder: str):
    """Readable, of a length that every system takes, and never a way to somewhere else."""
    assert folder_name(text) == folder


@pytest.mark.parametrize(
    "run_id",
    [
        *("", ".", "..", "a/b", "../x", "a\\b", "a b", "-rf", ".hidden", "a.", "a\n", "\u00e9"),
        *("a" * 129, "con", "NUL", "aux.txt", "com1", "a:b", "a\x00b", "/abs"),
    ],
)
def test_ids_that_cannot_name_a_directory_everywhere_are_refused(run_id: str):
    """An id never escapes its directory, and the error says what to do."""
    with pytest.raises(ConfigError, match="Change it, or leave it out") as caught:
        validate_run_id(run_id)
    assert isinstance(caught.value, ValueError)


def test_the_config_wins_over_the_launch_and_both_over_nothing(monkeypatch: pytest.MonkeyPatch):
    """The id is the configured one, else the launch's, else not known yet."""
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    assert known_run_id() is None
    monkeypatch.setenv(RUN_ID_VARIABLE, "")
    assert known_run_id() is None
    monkeypatch.setenv(RUN_ID_VARIABLE, "launched")
    assert known_run_id() == "launched"
    assert known_run_id("configured") == "configured"


def test_a_launch_with_a_bad_id_is_told_where_it_came_from(monkeypatch: pytest.MonkeyPatch):
    """The variable is named: the user wrote no id in the config."""
    monkeypatch.setenv(RUN_ID_VARIABLE, "../../etc")
    with pytest.raises(ConfigError, match=rf"environment variable {RUN_ID_VARIABLE}.*Change it"):
        known_run_id()


@pytest.mark.parametrize("before", [None, "outer"])
def test_the_variable_is_set_only_around_the_launch(
    monkeypatch: pytest.MonkeyPatch, before: str | None
):
    """A second run in the process does not inherit the first one's id, even after an error."""
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(RUN_ID_VARIABLE, before)

    def launch() -> None:
        with run_id_in_environment("inner"):
            assert os.environ[RUN_ID_VARIABLE] == "inner"
            raise RuntimeError("the launch failed")

    with pytest.raises(RuntimeError, match="the launch failed"):
        launch()
    assert os.environ.get(RUN_ID_VARIABLE) == before
