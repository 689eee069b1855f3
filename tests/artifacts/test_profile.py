"""What a profile says between and beyond its measurements."""

import pytest

from subspec.artifacts.profile import Timing, seconds_at


@pytest.mark.parametrize(
    ("width", "seconds"), [(1, 2.0), (2, 2.0), (5, 3.5), (8, 5.0), (11, 6.5), (16, 9.0)]
)
def test_seconds_lie_straight_between_two_widths_and_go_on_beyond_the_last(
    width: int, seconds: float
) -> None:
    assert seconds_at((Timing(2, 2.0), Timing(8, 5.0)), width) == pytest.approx(seconds)


def test_a_disturbed_width_does_not_make_all_wider_ones_shorter() -> None:
    timings = (Timing(1, 1.0), Timing(8, 5.0), Timing(16, 4.0))
    assert seconds_at(timings, 12) == pytest.approx(4.5)
    assert [seconds_at(timings, width) for width in (16, 64, 400)] == [4.0, 4.0, 4.0]
    assert [seconds_at((Timing(8, 5.0),), width) for width in (1, 8, 400)] == [5.0, 5.0, 5.0]
