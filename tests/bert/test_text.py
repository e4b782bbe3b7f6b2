"""Numbers in words."""

import pytest

from bert.text import count_of, duration, percent


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.2, "1 s"),
        (119, "119 s"),
        (120.5, "3 min"),
        (7140, "119 min"),
        (7141, "2 h 0 min"),
        (172740, "47 h 59 min"),
        (172741, "2 days 0 h"),
        (86400 * 1000 + 1, "1,000 days 1 h"),
    ],
)
def test_a_duration_is_rounded_up_and_has_two_units_at_most(seconds, words):
    assert duration(seconds) == words


def test_counts_have_thousands_and_plurals():
    assert count_of(1, "replica") == "1 replica" and count_of(1500, "replica") == "1,500 replicas"
    assert count_of(2, "micro-batch", "micro-batches") == "2 micro-batches"


def test_shares_are_percent():
    assert percent(0.3149) == "31 %" and percent(0.3149, 1) == "31.5 %"
