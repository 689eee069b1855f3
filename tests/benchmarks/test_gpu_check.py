"""What `make gpu-check` does at its end, on the simulated GPU."""

import pytest
from scripts import benchmark
from simcuda.device import simulated

gpu_check = benchmark("gpu_check")


def test_both_ways_to_attend_for_a_draft_are_timed_and_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("triton")
    with simulated() as gpus:
        found = gpu_check.draft_attention()
        assert not gpus.races
    assert found.keys() == {"draft, torch", "draft, in blocks"} and min(found.values()) > 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.count(" ms") == 2 and "draft, torch" in line and "draft, in blocks" in line
