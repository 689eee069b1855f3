"""What this machine is, whatever model will run on it: its device, its clock."""

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from subspec.artifacts.errors import Exit, SubspecError

DEVICE = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?", re.ASCII)
FEWEST_SAMPLES = 3
MOST_SAMPLES = 25
SECONDS_PER_ACTION = 0.1
UNKNOWN_OVERHEAD_BYTES = 1 << 30  # at most this much of a GPU is ours if the driver does not say


def pick_device(name: str | None) -> str:
    """The device asked for, or the GPU if there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = DEVICE.fullmatch(name)
    if match is None:
        raise SubspecError(
            Exit.USAGE, f"--device {name[:60]!r} is not known", "use cuda, cuda:N or cpu"
        )
    if name == "cpu":
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise SubspecError(
            Exit.WRONG_MACHINE, f"--device {name}, but torch finds no CUDA GPU", "use --device cpu"
        )
    if int(match[1] or 0) >= count:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"--device {name}, but this machine has {count} of them",
            f"use cuda:0 to cuda:{count - 1}",
        )
    return name


def gpu_overhead_bytes(device: torch.device) -> int:
    """What this process takes of the GPU beside its tensors: context, kernels, libraries."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    try:
        import pynvml
    except ImportError:
        return min(total - free - reserved, UNKNOWN_OVERHEAD_BYTES)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    ours = [
        process.usedGpuMemory
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if process.pid == os.getpid() and process.usedGpuMemory
    ]
    if not ours:  # in a container process ids are others than the driver's
        return min(total - free - reserved, UNKNOWN_OVERHEAD_BYTES)
    return max(ours[0] - reserved, 0)


def time_each(
    actions: Sequence[Callable[[], object]], device: torch.device
) -> list[tuple[float, float]]:
    """(median, slowest) wall seconds of each action, after one call that is not counted.

    In turns: what disturbs the machine for a moment then hits all of them alike.
    """
    for action in actions:
        action()
    synchronize(device)
    samples: list[list[float]] = [[] for _ in actions]
    until = time.perf_counter() + SECONDS_PER_ACTION * len(actions)
    for taken in range(MOST_SAMPLES):
        if taken >= FEWEST_SAMPLES and time.perf_counter() > until:
            break
        for action, own in zip(actions, samples, strict=True):
            started = time.perf_counter()
            action()
            synchronize(device)
            own.append(time.perf_counter() - started)
    return [(statistics.median(own), max(own)) for own in samples]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
