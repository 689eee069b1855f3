"""Links from slow to fast memory: from disk for cpu, from pinned host memory for cuda.

A link fills staging slots. It orders copies and compute: `wait` makes compute wait for the copy
into the slot, `release` makes the next copy into the slot wait for that compute.
"""

import errno
import fcntl
import functools
import os
import queue
import threading
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.common.command import say
from subspec.artifacts.common.errors import Exit, SubspecError, not_read
from subspec.runtime.clock import Record, unrecorded
from subspec.runtime.memory import bytes_of, check_host_memory, pinned_buffer, unpin

READ_BYTES = 64 << 20
OVERSLEPT_SECONDS = 0.002
CLOSING_SECONDS = 10.0  # to wait for a read; a lost disk or server may never answer


class Link(Protocol):
    @property
    def wait_seconds(self) -> float:
        """Seconds that compute has waited for copies."""

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        """Start copying into `slot` from byte `offset` of exact.safetensors."""

    def wait(self, slot: int) -> Tensor:
        """uint8 bytes of the slot, for compute issued from now on. Raises what the copy raised."""

    def release(self, slot: int) -> None:
        """Allow the slot to be overwritten after all compute that was issued so far."""

    def forget(self) -> None:
        """Drop all copies that were begun, and allow every slot to be overwritten."""

    def close(self) -> None: ...


class DirectFile:
    """A file that is read with direct I/O if the file system supports it, so that the page cache
    takes no memory of the budget; else a note is printed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            self._descriptor = os.open(path, flags)
            tell_of_cached_reads(error.strerror)

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fill target uint8 [bytes], page-aligned and a multiple of PAGE_BYTES long. Raises
        SubspecError: CORRUPT if the file is too short, RESOURCES if the disk fails; OSError if the
        system is short of something."""
        view, done = bytes_of(target), 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + READ_BYTES]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self._stop_direct_reads():
                    tell_of_cached_reads(error.strerror)
                    continue
                raise not_read(self._path.name, error) from None
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

    def _stop_direct_reads(self) -> bool:
        """Read through the page cache from now on; return False if that was so already. Some file
        systems refuse direct reads only once one is tried, or need larger blocks than pages."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)


@functools.cache  # once is enough
def tell_of_cached_reads(reason: str) -> None:
    say(
        f"note: the file system refuses direct reads ({reason}), so weights pass through the page "
        "cache, whose memory no budget covers and whose speed a plan cannot rely on"
    )


class DiskLink:
    """cpu: one reader thread, which reads without the GIL."""

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
        # (slot, offset, bytes); an event, set when reached; or None, which ends the thread
        self._requests: queue.SimpleQueue[tuple[int, int, int] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._filled: list[queue.SimpleQueue[BaseException | None]] = [
            queue.SimpleQueue() for _ in slots
        ]
        self._closing = threading.Event()  # do not wait for a limited link any more
        self._thread = threading.Thread(target=self._read_all, name="subspec-reader", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads
            self._file.close()
            raise

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
        """Nothing to do: compute on a CPU has already ended."""

    def forget(self) -> None:
        idle = threading.Event()
        self._requests.put(idle)
        idle.wait()
        for filled in self._filled:
            while not filled.empty():
                filled.get()

    @property
    def wait_seconds(self) -> float:
        return self._wait_seconds

    def close(self) -> None:
        self._closing.set()
        self._requests.put(None)
        self._thread.join(CLOSING_SECONDS)
        if not self._thread.is_alive():  # else it keeps file and slots, and ends with the process
            self._file.close()

    def _read_all(self) -> None:
        due = 0.0
        while (request := self._requests.get()) is not None:
            if self._closing.is_set():
                return
            if isinstance(request, threading.Event):
                request.set()
                continue
            slot, offset, num_bytes = request
            started = time.perf_counter()
            try:
                self._file.read_into(self._slots[slot][:num_bytes], offset)
            except BaseException as error:  # `wait` raises it: no layer may be skipped
                self._filled[slot].put(error)
                continue
            if self._bytes_per_second is not None:
                # Compensate for a last sleep that was a little too long.
                due = max(due, started - OVERSLEPT_SECONDS) + num_bytes / self._bytes_per_second
                left = max(0.0, due - time.perf_counter())
                self._closing.wait(min(left, threading.TIMEOUT_MAX))
            self._record("copy", f"slot {slot}", started, {"offset": offset, "bytes": num_bytes})
            self._filled[slot].put(None)


class HostLink:
    """cuda: pinned host memory, one DMA per block on its own stream, with events both ways."""

    def __init__(
        self,
        path: Path,
        ranges: list[tuple[int, int]],
        slots: list[Tensor],
        bytes_per_second: float | None,
    ) -> None:
        """`ranges`: (offset, bytes) of each block in the file, which are read and pinned here.
        Raises SubspecError."""
        self._device = slots[0].device
        self._slots = slots
        self._bytes_per_second = bytes_per_second
        self._copies = torch.cuda.Stream(self._device)
        self._delays = torch.cuda.Stream(self._device)
        self._cycles_per_second = cycles_per_second() if bytes_per_second is not None else 0.0
        # Slots are free at first: an event that was never recorded counts as completed.
        self._filled = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wait_seconds = 0.0
        self._host = pinned_copy(path, ranges)  # last: nothing after it can fail

    def host_bytes(self, offset: int) -> Tensor:
        """uint8 bytes of the range that begins at byte `offset` of the file."""
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

    def forget(self) -> None:
        for slot in range(len(self._slots)):
            self.release(slot)

    @property
    def wait_seconds(self) -> float:
        """Seconds that compute has waited. Synchronizes with past waits, so call it between
        rounds."""
        for before, after in self._waits:
            after.synchronize()
            self._wait_seconds += before.elapsed_time(after) / 1e3
        self._waits.clear()
        return self._wait_seconds

    def close(self) -> None:
        try:
            torch.cuda.synchronize(self._device)
        finally:  # also after an error of the GPU
            for buffer in self._host.values():
                unpin(buffer)
            self._host.clear()

    def _delay(self, num_bytes: int) -> torch.cuda.Event | None:
        """Event that completes when a link limited to `bytes_per_second` would have copied
        `num_bytes`; None without a limit. The delay runs in parallel with the copy."""
        if self._bytes_per_second is None:
            return None
        self._delays.wait_stream(self._copies)
        with torch.cuda.stream(self._delays):
            torch.cuda._sleep(int(num_bytes / self._bytes_per_second * self._cycles_per_second))
        due = torch.cuda.Event()
        due.record(self._delays)
        return due


def cycles_per_second() -> float:
    """Clock rate of torch.cuda._sleep on the current device, timed after a warm-up of a tenth of a
    second."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in (200_000_000, 20_000_000):
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return cycles / milliseconds * 1e3


def pinned_copy(path: Path, ranges: list[tuple[int, int]]) -> dict[int, Tensor]:
    """File offset -> pinned uint8 tensor of each range. On an error nothing stays pinned."""
    check_host_memory(sum(num_bytes for _, num_bytes in ranges))
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
