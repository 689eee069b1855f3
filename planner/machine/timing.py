"""This machine, whatever model will run on it: its devices, its clock, the disk of a folder."""

import math
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.gpu_memory import held_bytes
from subspec.artifacts.format.folder import DISK_IS_FULL
from subspec.artifacts.profile import Timing

DEVICE = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?", re.ASCII)
UNKNOWN_OVERHEAD_BYTES = 1 << 30  # at most this much of a GPU is ours if the driver does not say
FEWEST_SAMPLES = 3
MOST_SAMPLES = 60
SECONDS_PER_ACTION = 0.06
STREAM_SECONDS = 0.24
STREAM_PASS_BYTES = 16 << 20


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
            f"--device {name}, but the GPUs of this machine are cuda:0 to cuda:{count - 1}",
            "choose one of them",
        )
    return name


def gpu_overhead_bytes(device: torch.device) -> int:
    """What this process takes of the GPU beside its tensors: context, kernels, libraries."""
    reserved, held = torch.cuda.memory_reserved(device), held_bytes(device)
    if held is not None:
        return max(held - reserved, 0)
    free, total = torch.cuda.mem_get_info(device)
    return min(total - free - reserved, UNKNOWN_OVERHEAD_BYTES)


def time_each(
    actions: Sequence[Callable[[], object]], device: torch.device
) -> list[tuple[float, float]]:
    """(typical, slowest) wall seconds of each action, after one call that is not counted.

    In turns: what disturbs the machine for a moment then hits all of them alike. Typical is the
    lower quartile: on an idle machine that is the median less 1 or 2 %, and one program beside us
    may make most calls ten times slower, because threads wait for each other.
    """
    for action in actions:
        action()
    samples: list[list[float]] = [[] for _ in actions]
    until = time.perf_counter() + SECONDS_PER_ACTION * len(actions)
    for taken in range(MOST_SAMPLES):
        if taken >= FEWEST_SAMPLES and time.perf_counter() > until:
            break
        for action, own in zip(actions, samples, strict=True):
            _wait_for(device)
            started = time.perf_counter()
            action()
            _wait_for(device)
            own.append(time.perf_counter() - started)
    return [(sorted(own)[len(own) // 4], max(own)) for own in samples]


def time_widths(
    actions: Mapping[int, Callable[[], object]], device: torch.device, share: float = 1.0
) -> tuple[Timing, ...]:
    """Seconds at each width, ascending; the actions do `share` times what is asked for.

    A pass that took longer than a wider one was disturbed: it counts as the wider one.
    """
    found, shortest = list[Timing](), math.inf
    timed = time_each(list(actions.values()), device)
    for width, (typical, slowest) in reversed(list(zip(actions, timed, strict=True))):
        shortest = min(shortest, typical)
        found.insert(0, Timing(width, shortest / share, slowest / share))
    return tuple(found)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":  # not for copies that go on beside it, on a stream of their own
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def unnamed_file(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A path to random bytes on the disk of `folder`. However this process ends, nothing is left:
    the file never has a name there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            piece = os.urandom(1 << 20)
            for _ in range(num_bytes // len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            yield Path(f"/proc/self/fd/{file.fileno()}")
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES if error.errno in DISK_IS_FULL else Exit.USAGE,
            f"cannot write a test file of {num_bytes >> 20} MiB in {folder}: {error.strerror}",
            "make room or choose another --out",
        ) from None


class Stream(Protocol):
    """A link of the runtime's with two slots."""

    def begin(self, slot: int, offset: int, num_bytes: int) -> None: ...
    def wait(self, slot: int) -> object: ...
    def close(self) -> None: ...


def stream_rate(link: Stream, num_bytes: int, block_bytes: int) -> float:
    """Bytes per second over a file of `num_bytes`, read in a circle: the median over passes. Two
    blocks are under way at any time, as in the runtime's ring."""
    num_blocks, per_pass = num_bytes // block_bytes, max(2, STREAM_PASS_BYTES // block_bytes)
    rates, index = list[float](), 0
    link.begin(0, 0, block_bytes)
    until = time.perf_counter() + STREAM_SECONDS
    while not rates or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(per_pass):
            index += 1
            link.begin(index % 2, index % num_blocks * block_bytes, block_bytes)
            link.wait((index - 1) % 2)
        rates.append(per_pass * block_bytes / (time.perf_counter() - started))
    link.wait(index % 2)
    return statistics.median(rates)


@contextmanager
def streaming(link: Stream, num_bytes: int, block_bytes: int) -> Iterator[Callable[[], float]]:
    """Keeps the link busy inside the block, as `stream_rate` does; yields what tells its rate so
    far, in bytes per second."""
    num_blocks, ended = num_bytes // block_bytes, threading.Event()
    num_arrived, started = 0, time.perf_counter()

    def run() -> None:
        nonlocal num_arrived
        link.begin(0, 0, block_bytes)
        while not ended.is_set():
            index = num_arrived + 1
            link.begin(index % 2, index % num_blocks * block_bytes, block_bytes)
            link.wait((index - 1) % 2)
            num_arrived = index
        link.wait(num_arrived % 2)

    with ThreadPoolExecutor(1, thread_name_prefix="subspec-stream") as thread:
        reading = thread.submit(run)
        try:
            yield lambda: num_arrived * block_bytes / (time.perf_counter() - started)
        finally:
            ended.set()
    reading.result()  # raises what a read raised


def repetitions(action: Callable[[], object], device: torch.device) -> float:
    """How often per second the action runs, over a while: what disturbs it counts."""
    action()
    _wait_for(device)
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < STREAM_SECONDS:
        action()
        count += 1
        _wait_for(device)
    return count / (time.perf_counter() - started)
