import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from toys import make_profile

from subspec.artifacts.errors import Exit, SubspecError
from subspec.planner.profiles import read_profile, with_link


def write(folder: Path, values: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = make_profile()
    assert read_profile(write(tmp_path, asdict(profile))) == profile


TIMING = {"width": 1, "seconds": 1e-4, "slowest": 1e-4}
FAULTS: dict[str, tuple[str, Any]] = {
    "no link": ("link", []),
    "blocks that do not ascend": (
        "link", [{"block_bytes": 2, "bytes_per_second": 1e9}] * 2,
    ),
    "a link that stands still": ("link", [{"block_bytes": 4096, "bytes_per_second": 0.0}]),
    "a link beyond physics": ("link", [{"block_bytes": 4096, "bytes_per_second": 1e300}]),
    "no timings": ("exact_layer", []),
    "widths that do not ascend": ("draft_layer", [TIMING, TIMING]),
    "a width of 0": ("exact_head", [{**TIMING, "width": 0}]),
    "time that runs backwards": ("draft_head", [{**TIMING, "seconds": -1.0}]),
    "a time too short": ("plain_layer_seconds", 1e-300),
    "a time too long": ("prefill_token_seconds", 1e300),
    "a negative overhead": ("overhead_bytes", -1),
    "a negative round": ("round_seconds", -1.0),
    "no threads": ("num_threads", 0),
    "a row of width 0": ("position_free_widths", [0, 8]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_measurement_gives_is_refused(fault: str, tmp_path: Path) -> None:
    name, value = FAULTS[fault]
    path = write(tmp_path, {**asdict(make_profile()), name: value})
    with pytest.raises(SubspecError, match="profile.json: ") as caught:
        read_profile(path)
    assert caught.value.exit_code == Exit.CORRUPT


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"link": 1}', '{"device": "tpu"}'])
def test_what_is_not_a_profile_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="profile.json") as caught:
        read_profile(write(tmp_path, text))
    assert caught.value.exit_code == Exit.CORRUPT


def test_a_missing_file_and_a_folder_are_a_wrong_argument(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(SubspecError, match="is not a file") as caught:
            read_profile(path)
        assert caught.value.exit_code == Exit.USAGE


def test_a_slower_link_changes_only_what_is_faster_than_it() -> None:
    profile = make_profile()
    slow, fast = profile.link
    capped = with_link(profile, 60_000_000)
    assert capped.link == (slow, replace(fast, bytes_per_second=60e6))
    assert replace(capped, link=profile.link) == profile
