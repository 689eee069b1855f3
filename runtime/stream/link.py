"""The slow tier and the way from it: the disk for cpu, pinned host memory for cuda.

A link fills the slots of a ring. Both orderings are its business: `wait` puts the copy before the
compute that reads the slot, `release` puts that compute before the next copy into the slot.
"""

import os
import queue
import threading
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.memory import bytes_of, pinned_buffer, unpin

READ_BYTES = 64 << 20
OVERSLEPT_SECONDS = 0.002


class Link(Protocol):
    @property
    def wait_seconds(self) -> float:
        """How long compute has waited for copies."""

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        """Start filling `slot` from byte `offset` of exact.safetensors."""

    def wait(self, slot: int) -> Tensor:
        """The slot's bytes, for compute that is issued from now on. Raises what the copy raised."""

    def release(self, slot: int) -> None:
        """Compute that was issued up to now is the last that reads the slot."""

    def close(self) -> None: ...


class DirectFile:
    """A file read past the page cache where the file system allows it (memory caps stay true)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # a file system without direct I/O
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, target: Tensor, offset: int) -> None:
        """target uint8, page-aligned, a multiple of PAGE_BYTES long."""
        view, done = bytes_of(target), 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + READ_BYTES]], offset + done)
            except OSError as error:
                raise SubspecError(
                    Exit.CORRUPT, f"{self._path.name}: reading failed: {error.strerror}"
                ) from None
            if count <= 0:
                raise SubspecError(
                    Exit.CORRUPT,
                    f"{self._path.name} ends at byte {offset + done}, "
                    f"expected {len(view) - done} more",
                    "copy or build the artifact again",
                )
            done += count

    def close(self) -> None:
        os.close(self._descriptor)


class DiskLink:
    """cpu: one reader thread; the interpreter is free while it reads."""

    def __init__(
        self,
        path: Path,
        slots: list[Tensor],
        bytes_per_second: float | None,
        record: Record = unrecorded,
    ) -> None:
        self._wait_seconds = 0.0
        self._record = record
        self._file = DirectFile(path)
        self._slots = slots
        self._bytes_per_second = bytes_per_second
        self._requests: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._filled: list[queue.SimpleQueue[BaseException | None]] = [
            queue.SimpleQueue() for _ in slots
        ]
        self._thread = threading.Thread(target=self._read_all, name="subspec-reader", daemon=True)
        self._thread.start()

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        self._requests.put((slot, offset, num_bytes))

    def wait(self, slot: int) -> Tensor:
        started = time.perf_counter()
        error = self._filled[slot].get()
        self._wait_seconds += time.perf_counter() - started
        self._record("wait", f"slot {slot}", started, {})
        if error is not None:
            raise error
        return self._slots[slot]

    def release(self, slot: int) -> None:
        """Compute on a cpu has ended when the call returns."""

    @property
    def wait_seconds(self) -> float:
        return self._wait_seconds

    def close(self) -> None:
        self._requests.put(None)
        self._thread.join()
        self._file.close()

    def _read_all(self) -> None:
        due = 0.0
        while (request := self._requests.get()) is not None:
            slot, offset, num_bytes = request
            started = time.perf_counter()
            try:
                self._file.read_into(self._slots[slot][:num_bytes], offset)
            except BaseException as error:  # to the consumer: a failed read must not skip a layer
                self._filled[slot].put(error)
                continue
            if self._bytes_per_second is not None:
                # The last sleep may have been a little too long: that is made up for.
                due = max(due, started - OVERSLEPT_SECONDS) + num_bytes / self._bytes_per_second
                time.sleep(max(0.0, due - time.perf_counter()))
            self._record("copy", f"slot {slot}", started, {"offset": offset, "bytes": num_bytes})
            self._filled[slot].put(None)


class HostLink:
    """cuda: pinned host memory, one DMA per block on a stream of its own, events both ways."""

    def __init__(
        self,
        path: Path,
        ranges: list[tuple[int, int]],
        slots: list[Tensor],
        bytes_per_second: float | None,
    ) -> None:
        """`ranges`: (offset, bytes) of each block in the file; read and pinned here, once."""
        self._device = slots[0].device
        self._slots = slots
        self._bytes_per_second = bytes_per_second
        self._host = pinned_copy(path, ranges)
        self._copies = torch.cuda.Stream(self._device)
        self._delays = torch.cuda.Stream(self._device)
        self._cycles_per_second = cycles_per_second() if bytes_per_second is not None else 0.0
        # A slot begins free: both events count as recorded in the past.
        self._filled = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wait_seconds = 0.0

    def host_bytes(self, offset: int) -> Tensor:
        """uint8: what lies at byte `offset` of the file, up to the end of its range."""
        return self._host[offset]

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free[slot])
            delay = self._delay(num_bytes)
            self._slots[slot][:num_bytes].copy_(self._host[offset], non_blocking=True)
            if delay is not None:
                self._copies.wait_event(delay)
            self._filled[slot].record(self._copies)

    def wait(self, slot: int) -> Tensor:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        compute = torch.cuda.current_stream(self._device)
        before.record(compute)
        compute.wait_event(self._filled[slot])
        after.record(compute)
        self._waits.append((before, after))
        return self._slots[slot]

    def release(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self._device))

    @property
    def wait_seconds(self) -> float:
        """Reads the events of finished waits; call it between rounds."""
        for before, after in self._waits:
            after.synchronize()
            self._wait_seconds += before.elapsed_time(after) / 1e3
        self._waits.clear()
        return self._wait_seconds

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        for buffer in self._host.values():
            unpin(buffer)
        self._host.clear()

    def _delay(self, num_bytes: int) -> torch.cuda.Event | None:
        """Passes when a slower link would have brought what is copied from now on (benchmarks). It
        runs beside the copy: after it, the two would add up."""
        if self._bytes_per_second is None:
            return None
        self._delays.wait_stream(self._copies)
        with torch.cuda.stream(self._delays):
            torch.cuda._sleep(int(num_bytes / self._bytes_per_second * self._cycles_per_second))
        due = torch.cuda.Event()
        due.record(self._delays)
        return due


def cycles_per_second() -> float:
    """Of torch.cuda._sleep, on the current device as it runs now: timed, after a tenth of a second
    that ends its rest."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in (200_000_000, 20_000_000):
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return cycles / milliseconds * 1e3


def pinned_copy(path: Path, ranges: list[tuple[int, int]]) -> dict[int, Tensor]:
    """File offset -> pinned uint8 tensor of each range. An error leaves nothing pinned."""
    file, found = DirectFile(path), dict[int, Tensor]()
    try:
        for offset, num_bytes in ranges:
            found[offset] = pinned_buffer(num_bytes)
            file.read_into(found[offset], offset)
    except BaseException:
        for buffer in found.values():
            unpin(buffer)
        raise
    finally:
        file.close()
    return found
