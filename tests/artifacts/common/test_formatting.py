import pytest

from subspec.artifacts.common.formatting import big_number, counted, duration, number


def test_one_of_a_thing_has_no_plural() -> None:
    assert [counted(count, "token") for count in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.08123, "0.0812"),
        (0.456, "0.46"),
        (3.14159, "3.14"),
        (31.4159, "31.4"),
        (31415.9, "31416"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (12e-6, "12.0 µs"), (0.25, "250 ms"), (1.5, "1.50 s"), (2e-7, "0.20 µs")],
)
def test_durations_have_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_large_counts_are_written_in_words() -> None:
    counts = (999_999, 1_500_000, 32_800_000_000)
    assert [big_number(count) for count in counts] == ["999999", "1.50 million", "32.8 billion"]
