"""Growing, warming up, filling and being emptied, told apart from a dozen numbers."""

import pytest

from cbn_lab.diagnostics import trend


@pytest.mark.parametrize(
    "values, growing",
    [
        (range(12), True),
        ([5 * n + 1 for n in range(12)], True),
        ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2], True),  # one every five steps
        ([n // 4 for n in range(12)], True),
        ([0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], False),  # made at the first step
        ([1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6], False),  # a cache that fills
        ([1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2], False),  # emptied every five steps
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1], False),  # emptied once
        ([7] * 12, False),
        (range(6), True),
    ],
)
def test_grows(values, growing):
    assert trend.grows(list(values)) == growing


def test_slope_is_that_of_the_second_half():
    assert trend.per_step([0, 90, 91, 92, 93, 94]) == 1
    assert trend.per_step([0, 0, 0, 0, 1, 1]) == 0.5


def test_a_noisy_measure_must_climb_evenly():
    assert trend.climbs_steadily([0, 9000, 10000, 11000, 12100, 13000, 14000, 15200, 16000], 900)
    assert not trend.climbs_steadily([0, 1, 2, 3, 4, 1004, 2004, 9004, 9104], 900)
    assert not trend.climbs_steadily([0, 1, 2, 3, 4, 5, 6, 7, 8], 900)
    assert not trend.climbs_steadily([0, 1000, 2000, 3000, 4000], 900)  # too short to tell
