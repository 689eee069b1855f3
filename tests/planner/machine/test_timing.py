import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.profile import Timing
from subspec.planner.build import weights
from subspec.planner.machine import timing
from subspec.planner.machine.timing import (
    USUAL_EFFORT,
    Cursor,
    Effort,
    pick_device,
    repetitions,
    stream_rate,
    streaming,
    time_each,
    time_widths,
    unnamed_file,
)

CPU = torch.device("cpu")


class Clock:
    """Time passes only when an action says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def action(self, *seconds: float) -> "Action":
        return Action(self, seconds)


class Action:
    def __init__(self, clock: Clock, seconds: tuple[float, ...]) -> None:
        self.clock, self.seconds, self.num_calls = clock, seconds, 0

    def __call__(self) -> None:
        self.clock.now += self.seconds[self.num_calls % len(self.seconds)]
        self.num_calls += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_the_first_call_does_not_count(clock: Clock) -> None:
    action = clock.action(9.0, *(0.01,) * 99)
    assert time_each([action], CPU) == [pytest.approx((0.01, 0.01))]
    assert action.num_calls == 1 + 7  # as many as fit 0.06 s


def test_the_middle_of_the_samples_is_typical(clock: Clock) -> None:
    typical, slowest = time_each([clock.action(0.1, 0.5, 0.2)], CPU)[0]
    assert (typical, slowest) == pytest.approx((0.2, 0.5))


def test_a_fast_action_is_not_called_for_ever_and_a_slow_one_often_enough(clock: Clock) -> None:
    fast, slow = clock.action(1e-6), clock.action(30.0)
    time_each([fast], CPU)
    time_each([slow], CPU)
    assert fast.num_calls == 1 + USUAL_EFFORT.most_samples
    assert slow.num_calls == 1 + USUAL_EFFORT.fewest_samples


def test_every_width_has_its_own_time_whatever_the_others_take(clock: Clock) -> None:
    actions = {1: clock.action(2.0), 4: clock.action(9.0), 8: clock.action(6.0)}
    found = time_widths(actions, CPU, share=2)
    assert found == (Timing(1, 1.0, 1.0), Timing(4, 4.5, 4.5), Timing(8, 3.0, 3.0))


def test_less_effort_takes_fewer_samples(clock: Clock) -> None:
    action = clock.action(0.001)
    time_each([action], CPU, Effort(fewest_samples=1, action_seconds=0.0))
    assert action.num_calls == 1 + 1


@pytest.mark.parametrize("num_bytes", [2 << 20, (16 << 20) + 4096, 40 << 20])
def test_an_unnamed_file_has_the_bytes_asked_for_and_no_name(
    num_bytes: int, tmp_path: Path
) -> None:
    with unnamed_file(tmp_path, num_bytes) as path:
        assert len(path.read_bytes()) == num_bytes
        assert os.listdir(tmp_path) == []


def test_what_is_streamed_and_what_is_timed_in_its_place_are_empty_files_when_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for module in (timing, weights):
        monkeypatch.setattr(
            module, "keep_uncompressed", lambda number: sizes.append(os.fstat(number).st_size)
        )
    with unnamed_file(tmp_path, 2 << 20), weights.HashedFile(tmp_path / "exact.safetensors"):
        assert sizes == [0, 0]


def test_no_block_of_an_unnamed_file_is_like_another(tmp_path: Path) -> None:
    """Or a device might store one of them, and keep it."""
    with unnamed_file(tmp_path, 40 << 20) as path:
        data = path.read_bytes()
    blocks = {data[first : first + 512] for first in range(0, len(data), 512)}
    assert len(blocks) == len(data) // 512
    assert len(set(data)) == 256


def test_a_cursor_reads_everything_once_before_it_begins_again() -> None:
    cursor = Cursor(10)
    assert [cursor.next_block(size) for size in (3, 3, 4, 5, 5, 4, 4, 10, 1)] == [
        0, 3, 6, 0, 5, 0, 4, 0, 0,
    ]  # fmt: skip
    assert [cursor.next_block(size) for size in (4, 4, 4)] == [1, 5, 0], "a short end is left out"


def test_a_full_disk_and_a_folder_that_takes_no_file_are_told_apart(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(SubspecError, match="test file of 2 MiB") as full:
            with unnamed_file(tmp_path, 2 << 20):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(SubspecError) as missing:
        with unnamed_file(tmp_path / "missing", 2 << 20):
            pass
    assert (full.value.exit_code, missing.value.exit_code) == (Exit.RESOURCES, Exit.USAGE)


class SlowLink:
    """A slot is filled in the order of the requests, at 100 MB/s."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.under_way: list[tuple[int, int, int]] = []
        self.offsets: list[int] = []

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        assert slot not in [busy for busy, _, _ in self.under_way]
        self.under_way.append((slot, offset, num_bytes))
        self.offsets.append(offset)

    def wait(self, slot: int) -> None:
        first, _, num_bytes = self.under_way.pop(0)
        assert first == slot
        self.clock.now += num_bytes / 100e6

    def close(self) -> None:
        assert self.under_way == []


def test_a_link_is_timed_in_a_circle_with_two_blocks_under_way(clock: Clock) -> None:
    link = SlowLink(clock)
    cursor = Cursor(10 << 20)
    assert stream_rate(link, cursor, 3 << 20) == pytest.approx(100e6)
    assert link.offsets[:4] == [0, 3 << 20, 6 << 20, 0]
    num_before, last = len(link.offsets), link.offsets[-1]
    stream_rate(link, cursor, 1 << 20)
    assert link.offsets[num_before] == last + (3 << 20) if last < 6 << 20 else 0, "it goes on"
    assert link.under_way == []


class WaitingLink(SlowLink):
    """One whose blocks take a millisecond each, by the real clock."""

    def __init__(self) -> None:
        self.under_way, self.offsets = [], []

    def wait(self, slot: int) -> None:
        time.sleep(0.001)
        first, _, _ = self.under_way.pop(0)
        assert first == slot


def test_a_link_is_kept_busy_while_something_else_runs_and_not_longer() -> None:
    link = WaitingLink()
    with streaming(link, Cursor(10 << 20), 3 << 20) as bytes_per_second:
        while len(link.offsets) < 20:
            time.sleep(0.001)
        assert 3 << 20 < bytes_per_second() < 1.2 * (3 << 20) / 0.001
    num_blocks = len(link.offsets)
    assert set(link.offsets) == {0, 3 << 20, 6 << 20}
    assert link.under_way == [], "a block under way would be written into freed memory"
    assert not any(thread.name.startswith("subspec-stream") for thread in threading.enumerate())
    time.sleep(0.01)
    assert len(link.offsets) == num_blocks


def test_a_busy_link_rests_again_after_an_error() -> None:
    link = WaitingLink()
    with pytest.raises(RuntimeError, match="a layer failed"):
        with streaming(link, Cursor(8 << 20), 1 << 20):
            raise RuntimeError("a layer failed")
    assert link.under_way == []
    assert not any(thread.name.startswith("subspec-stream") for thread in threading.enumerate())


def test_what_a_read_beside_a_layer_raised_is_raised_here() -> None:
    class Broken(WaitingLink):
        def wait(self, slot: int) -> None:
            raise SubspecError(Exit.CORRUPT, "reading failed")

    with pytest.raises(SubspecError, match="reading failed"):
        with streaming(Broken(), Cursor(8 << 20), 1 << 20):
            pass


def test_repetitions_count_what_is_disturbed(clock: Clock) -> None:
    """The mean of 10 and 50 ms, not the usual one; the first call does not count."""
    action = clock.action(9.0, *(0.01, 0.05) * 99)
    assert repetitions(action, CPU) == pytest.approx(1 / 0.03, rel=0.1)
    assert action.num_calls == 1 + 2 * USUAL_EFFORT.stream_seconds / 0.06


def test_a_slow_action_is_repeated_once(clock: Clock) -> None:
    action = clock.action(5.0)
    assert repetitions(action, CPU) == pytest.approx(0.2)
    assert action.num_calls == 2


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == pick_device("cpu") == "cpu"
    with pytest.raises(SubspecError) as caught:
        pick_device("cuda")
    assert caught.value.exit_code == Exit.WRONG_MACHINE


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert [pick_device(name) for name in (None, "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(SubspecError, match="cuda:0 to cuda:1"):
        pick_device("cuda:2")
