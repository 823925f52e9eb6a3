from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint.names import Key, NameTemplate, duration_text, slug


@pytest.mark.parametrize("metric", ["val.loss", "acc[1]", "val:loss", "a b", "val/loss", "x!r"])
def test_keys_are_literal(metric: str):
    """A metric's name is never taken for Python's format syntax."""
    template = NameTemplate.parse(f"e{{epoch}}-{{{metric}:.2f}}-{{{metric}}}")

    assert template.render({"epoch": 3, metric: 0.125}) == ("e3-0.12-0.125", [])


def test_the_longest_known_name_wins():
    """`{a:b:.1f}` is the metric `a:b` if there is one, else `a` with a format."""
    template = NameTemplate.parse("{a:b:.1f}")

    assert template.render({"a:b": 0.25, "a": 1.0}) == ("0.2", [])


def test_missing_keys_are_reported_and_do_not_raise():
    """A key that was not logged, or a format that does not fit, reads `none`."""
    assert NameTemplate.parse("{typo}-{x:d}").render({"x": 0.5}) == ("none-none", ["typo", "x:d"])


@given(st.text(), st.text(), st.floats() | st.text())
def test_a_name_never_leaves_its_folder(text: str, key: str, value: float | str):
    """Whatever the template and the values are, the name is one safe path component or refused."""
    try:
        template = NameTemplate.parse(text)
    except ConfigError:
        template = NameTemplate(("a", Key(key)))
    name, _ = template.render({key: value, "epoch": 1})

    assert re.fullmatch(r'[^/\\\x00-\x1f<>:"|?*]+', name)
    assert name not in (".", "..")
    assert len(name.encode()) <= 180


def test_braces_are_written_twice():
    """`{{` and `}}` stand for themselves."""
    assert NameTemplate.parse("{{a}}{step}").render({"step": 1}) == ("{a}1", [])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (93784, "1d_2h_3m_4s"), (86400, "1d"), (3601, "1h_1s"), (-1, "0s")],
)
def test_durations_read_as_documented(seconds: float, text: str):
    """Days, hours, minutes, seconds; zeros are left out."""
    assert duration_text(seconds) == text


def test_slugs_keep_letters_digits_and_underscores():
    """Slash, blank and dot become an underscore, as in the documented paths."""
    assert slug("val/the loss.x") == "val_the_loss_x"
