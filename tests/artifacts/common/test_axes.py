"""Ticks of axes."""

import pytest

from subspec.artifacts.common.axes import axis


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0, 107, "0 50 100"), (81, 119, "90 100 110"), (0, 1, "0 0.2 0.4 0.6 0.8 1")],
)
def test_an_axis_has_a_few_round_ticks_between_its_ends(
    low: float, high: float, labels: str
) -> None:
    assert [label for _, label in axis(low, high, "{:g}".format).ticks] == labels.split()
