"""What other programs take of the processors is told apart from what this one takes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from subspec.artifacts.common import cpu_load
from subspec.artifacts.common.cpu_load import (
    CpuTimes,
    background_cpu_share,
    busy_ticks,
    cpu_times,
    usable_cpus,
)

STAT = """cpu  61 8 15 849 27 3 2 37 9 0
cpu0 15 1 6 400 1 1 1 19 4 0
cpu1 46 7 9 449 26 2 1 18 5 0
intr 1234 5 6
ctxt 99
cpufreq 7
"""


def test_a_cpu_is_busy_unless_it_is_idle_or_waits_for_a_disk() -> None:
    assert busy_ticks(STAT, {0, 1}) == (15 + 1 + 6 + 1 + 1 + 19 + 46 + 7 + 9 + 2 + 1 + 18, 2)


def test_only_cpus_that_the_process_may_use_count() -> None:
    assert busy_ticks(STAT, {0}) == (43, 1)
    assert busy_ticks(STAT, {1, 7}) == (83, 1)
    assert busy_ticks(STAT, {30, 31}) == (126, 2), "a container's own numbers"
    assert busy_ticks("", {0}) == (0, 0)


@pytest.mark.parametrize(
    ("busy", "own", "share"),
    [
        (0.0, 0.0, 0.0),
        (20.0, 20.0, 0.0),  # all CPUs, by this process alone
        (12.0, 8.0, 0.2),
        (20.0, 0.0, 1.0),
        (7.9, 8.0, 0.0),  # counted in ticks of the one and nanoseconds of the other
        (21.0, 0.5, 1.0),
    ],
)
def test_the_share_of_others_is_what_was_busy_without_us(
    busy: float, own: float, share: float
) -> None:
    start, end = CpuTimes(5.0, 100.0, 3.0, 2), CpuTimes(15.0, 100.0 + busy, 3.0 + own, 2)
    assert background_cpu_share(start, end) == pytest.approx(share)


def test_what_the_system_does_not_tell_counts_as_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_load, "STAT", Path("/nonexistent"))
    start = cpu_times()
    assert start.num_cpus == 0 and background_cpu_share(start, cpu_times()) == 0
    moment = CpuTimes(5.0, 100.0, 3.0, 2)
    assert background_cpu_share(moment, moment) == 0
    assert background_cpu_share(moment, CpuTimes(6.0, 0.0, 3.0, 1)) == 0, "CPUs were taken away"


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}, 3),
    ],
    ids=str,
)
def test_a_quota_of_cpu_time_is_rounded_up_to_whole_cpus(
    files: dict[str, str], usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(cpu_load, "own_groups", lambda controller: [tmp_path / "own", tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert usable_cpus() == usable


@contextmanager
def spinning() -> Iterator[None]:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def test_a_program_that_spins_on_our_cpu_is_seen() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with spinning():
            start = cpu_times()
            time.sleep(0.5)
            assert background_cpu_share(start, cpu_times()) > 0.5
    finally:
        os.sched_setaffinity(0, allowed)


def test_children_that_ended_count_as_our_own() -> None:
    before = cpu_times()
    words = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"]
    subprocess.run(words, check=True)
    assert cpu_times().own - before.own > 0.25
