import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size, parse_size, short_size, size_argument


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GB", 24_000_000_000),
        ("24 GB", 24_000_000_000),
        ("24G", 24_000_000_000),
        ("24GiB", 25_769_803_776),
        ("7.5GiB", 8_053_063_680),
        ("0.1GB", 100_000_000),
        ("512B", 512),
        ("1PiB", 1 << 50),
    ],
)
def test_si_and_iec_units_are_two_things(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["24gb", "24Gb", "24 Mb"])
def test_a_small_b_is_refused_because_it_means_bits(text: str) -> None:
    with pytest.raises(SubspecError) as caught:
        parse_size(text)
    assert caught.value.exit_code == Exit.USAGE
    assert "bits" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "24GBs",
        "٢٤GB",
        "999999999999999TB",
        "1025TiB",
        "0GB",
        "0.1B",
        "-1GB",
        "24",
        "",
        "GB",
        "1e9B",
        "24kB",
        "24GB\n",
        " 24GB",
        "nanGB",
        "9" * 400 + "GB",
        "1." + "9" * 400 + "GB",
    ],
)
def test_what_is_not_a_size_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(SubspecError) as caught:
        parse_size(text)
    assert caught.value.exit_code == Exit.USAGE
    assert repr(text) in caught.value.message
    assert caught.value.hint


def test_a_size_is_shown_in_both_units() -> None:
    assert format_size(25_769_803_776) == "25.77 GB (24.00 GiB)"
    assert format_size(24_000_000_000) == "24.00 GB (22.35 GiB)"
    assert format_size(512) == "512 B (512 B)"
    assert short_size(1_500) == "1.50 KB"


@pytest.mark.parametrize(
    ("num_bytes", "argument"),
    [
        (20_971_520_001, "20.98GB"),
        (21_000_000_000, "21GB"),
        (5_060_000_000, "5.06GB"),
        (999_999_999, "1000MB"),
        (123_456_789, "123.5MB"),
        (1_000_000_000_001, "1.001TB"),
        (512, "512B"),
        (1, "1B"),
    ],
)
def test_a_size_to_ask_for_is_short_and_never_too_small(num_bytes: int, argument: str) -> None:
    assert size_argument(num_bytes) == argument
    assert num_bytes <= parse_size(argument) <= max(num_bytes + 1, num_bytes * 1.001)
