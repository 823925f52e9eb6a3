from __future__ import annotations

import pytest

from nshtrainer.quantities import age_text, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (2_500_000_000, "2.5 GB"),
        (7.25e15, "7250.0 TB"),
    ],
)
def test_a_size_has_a_decimal_unit(size, text):
    """Bytes are whole, larger sizes have one digit, and the largest unit has no end."""
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (5400, "2 h"),
        (86400 * 3, "3 d"),
    ],
)
def test_an_age_is_in_the_largest_unit_that_fits(seconds, text):
    """One number and one unit; an age that is not known is no text."""
    assert age_text(seconds) == text
