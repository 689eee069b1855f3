"""What the driver says of this process, told by a driver made of paper."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from subspec.artifacts.common.gpu_memory import held_bytes
from subspec.planner.machine.timing import UNKNOWN_OVERHEAD_BYTES, gpu_overhead_bytes

GPU = torch.device("cuda", 1)


class NVMLError(Exception):
    pass


def driver(monkeypatch: pytest.MonkeyPatch, *processes: tuple[int, int], fails: bool = False):  # type: ignore[no-untyped-def]
    """processes: (pid, bytes)."""

    def begin() -> None:
        if fails:
            raise NVMLError("Driver Not Loaded")

    def running(handle: str) -> list[SimpleNamespace]:
        assert handle == "handle of GPU-1234"
        return [SimpleNamespace(pid=pid, usedGpuMemory=count) for pid, count in processes]

    paper = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=begin,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetComputeRunningProcesses=running,
    )
    monkeypatch.setitem(sys.modules, "pynvml", paper)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))


def test_ours_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, (1, 7_000), (os.getpid(), 5_000))
    assert held_bytes(GPU) == 5_000
    assert gpu_overhead_bytes(GPU) == 4_900


@pytest.mark.parametrize("fails", [False, True])
def test_where_the_driver_does_not_tell_little_is_believed(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """As in a container; five GiB may be another program's."""
    driver(monkeypatch, (1, 7_000), fails=fails)
    assert held_bytes(GPU) is None
    assert gpu_overhead_bytes(GPU) == UNKNOWN_OVERHEAD_BYTES


def test_without_the_drivers_library_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert held_bytes(GPU) is None
