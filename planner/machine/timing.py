"""Timing of actions and links on this machine, independent of models; choice of a device."""

import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.gpu_memory import held_bytes
from subspec.artifacts.common.host_memory import free_host_bytes, host_bytes
from subspec.artifacts.format.folder import DISK_IS_FULL
from subspec.artifacts.format.tensors import keep_uncompressed
from subspec.artifacts.profile import Timing
from subspec.runtime.kernels.linear import check_capability
from subspec.runtime.memory import bytes_of

DEVICE = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?", re.ASCII)
UNKNOWN_OVERHEAD_BYTES = 1 << 30  # upper bound of the overhead if the driver does not tell
STREAM_PASS_BYTES = 16 << 20  # in one timing of several blocks
PIECE_BYTES = 16 << 20  # of a test file, written at a time


@dataclass(frozen=True)
class Effort:
    """Duration of the measurements of a machine; 15 to 20 s on two cores with the defaults."""

    passes: int = 3  # over everything, as the speed of a shared machine varies
    fewest_samples: int = 3  # of an action
    most_samples: int = 60
    action_seconds: float = 0.06  # for the samples of one action
    stream_seconds: float = 0.24  # for one block size of the link, and for contention
    place_seconds: float = 5.0  # for widths beyond USUAL_WIDTH (microbench.py)
    # Size of the data that the link is timed with: the model's size within these bounds. All of it
    # is read before a byte is read again, so that caches (a host's page cache, a disk's memory, a
    # processor's last level) have other bytes by then. At least one of the largest blocks
    # (MAX_BLOCK of measure.py); at most what takes a few seconds to write.
    least_link_bytes: int = 64 << 20
    most_link_bytes: int = 1 << 30
    # Whether torch compiles the draft of a model that draft_layers.cpp does not know: up to a
    # minute, once for a model's sizes.
    compiles_graphs: bool = True


USUAL_EFFORT = Effort()


def pick_device(name: str | None) -> str:
    """The requested device, or the GPU if there is one. Raises SubspecError: USAGE for an unknown
    name, WRONG_MACHINE if there is no such device, or if it is too old."""
    if name is None and not torch.cuda.is_available():
        return "cpu"
    name = name or "cuda"
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
    check_capability(torch.device(name))
    return name


def fast_memory_bytes(device: str) -> int:
    """All fast memory of the device, in use or not."""
    if device == "cpu":
        return host_bytes()
    total: int = torch.cuda.get_device_properties(torch.device(device)).total_memory
    return total


def free_memory_bytes(device: str) -> int:
    """Fast memory of the device that nobody uses now."""
    if device == "cpu":
        return free_host_bytes()
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free)


def gpu_overhead_bytes(device: torch.device) -> int:
    """GPU memory of this process other than tensors: context, kernels, libraries."""
    reserved, held = torch.cuda.memory_reserved(device), held_bytes(device)
    if held is not None:
        return max(held - reserved, 0)
    free, total = torch.cuda.mem_get_info(device)
    return min(total - free - reserved, UNKNOWN_OVERHEAD_BYTES)


def time_each(
    actions: Sequence[Callable[[], object]], device: torch.device, effort: Effort = USUAL_EFFORT
) -> list[tuple[float, float]]:
    """(median, slowest) wall seconds of each action, after one call that is not counted.

    The actions take turns, so that a disturbance affects all of them alike.
    """
    for action in actions:
        action()
    samples: list[list[float]] = [[] for _ in actions]
    until = time.perf_counter() + effort.action_seconds * len(actions)
    for taken in range(effort.most_samples):
        if taken >= effort.fewest_samples and time.perf_counter() > until:
            break
        for action, own in zip(actions, samples, strict=True):
            _wait_for(device)
            started = time.perf_counter()
            action()
            _wait_for(device)
            own.append(time.perf_counter() - started)
    return [(statistics.median(own), max(own)) for own in samples]


def time_widths(
    actions: Mapping[int, Callable[[], object]],
    device: torch.device,
    share: float = 1.0,
    effort: Effort = USUAL_EFFORT,
) -> tuple[Timing, ...]:
    """Timings by width. An action does `share` times the work that its timing is for.

    Times may fall with the width: the search tries every tree, and `seconds_at` does not
    extrapolate a falling slope.
    """
    timed = time_each(list(actions.values()), device, effort)
    return tuple(
        Timing(width, typical / share, slowest / share)
        for width, (typical, slowest) in zip(actions, timed, strict=True)
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":  # not for copies on other streams
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def unnamed_file(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Path to a file of `num_bytes` random bytes on the disk of `folder`. They do not repeat, as a
    disk may deduplicate. The file has no name, so nothing is left however this process ends. Raises
    SubspecError: RESOURCES if the disk is full, else USAGE."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            keep_uncompressed(file.fileno())  # as an artifact's weights are
            random, piece = torch.Generator(), torch.empty(PIECE_BYTES // 8, dtype=torch.int64)
            for first in range(0, num_bytes, PIECE_BYTES):
                piece.random_(generator=random)
                file.write(bytes_of(piece.view(torch.uint8))[: num_bytes - first])
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield Path(f"/proc/self/fd/{file.fileno()}")
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES if error.errno in DISK_IS_FULL else Exit.USAGE,
            f"cannot write a test file of {num_bytes >> 20} MiB in {folder}: {error.strerror}",
            "make room or choose another --out",
        ) from None


@dataclass
class Cursor:
    """Position of the next read of slow memory: it passes through all bytes, whatever the block
    sizes, before it starts again."""

    num_bytes: int
    position: int = 0

    def next_block(self, block_bytes: int) -> int:
        """Offset of the next whole block; a rest at the end that is too short is skipped."""
        if self.position + block_bytes > self.num_bytes:
            self.position = 0
        self.position += block_bytes
        return self.position - block_bytes


class Stream(Protocol):
    """A link of the runtime, with two slots."""

    def begin(self, slot: int, offset: int, num_bytes: int) -> None: ...
    def wait(self, slot: int) -> object: ...
    def close(self) -> None: ...


def stream_rate(
    link: Stream, cursor: Cursor, block_bytes: int, effort: Effort = USUAL_EFFORT
) -> float:
    """Bytes per second, the median over passes. Two blocks are in flight at any time, as in the
    runtime's ring."""
    per_pass = max(2, STREAM_PASS_BYTES // block_bytes)
    rates, index = list[float](), 0
    link.begin(0, cursor.next_block(block_bytes), block_bytes)
    until = time.perf_counter() + effort.stream_seconds
    while not rates or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(per_pass):
            index += 1
            link.begin(index % 2, cursor.next_block(block_bytes), block_bytes)
            link.wait((index - 1) % 2)
        rates.append(per_pass * block_bytes / (time.perf_counter() - started))
    link.wait(index % 2)
    return statistics.median(rates)


@contextmanager
def streaming(link: Stream, cursor: Cursor, block_bytes: int) -> Iterator[Callable[[], float]]:
    """Keep the link busy inside the block, as `stream_rate` does; yields a function that returns
    the rate so far, in bytes per second."""
    ended, num_arrived, started = threading.Event(), 0, time.perf_counter()

    def run() -> None:
        nonlocal num_arrived
        link.begin(0, cursor.next_block(block_bytes), block_bytes)
        while not ended.is_set():
            index = num_arrived + 1
            link.begin(index % 2, cursor.next_block(block_bytes), block_bytes)
            link.wait((index - 1) % 2)
            num_arrived = index
        link.wait(num_arrived % 2)

    with ThreadPoolExecutor(1, thread_name_prefix="subspec-stream") as thread:
        reading = thread.submit(run)
        try:
            yield lambda: num_arrived * block_bytes / (time.perf_counter() - started)
        finally:
            ended.set()
    reading.result()  # raises errors of the thread


def repetitions(
    action: Callable[[], object], device: torch.device, effort: Effort = USUAL_EFFORT
) -> float:
    """Mean rate of the action in calls per second, disturbances included."""
    action()
    _wait_for(device)
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < effort.stream_seconds:
        action()
        count += 1
        _wait_for(device)
    return count / (time.perf_counter() - started)
