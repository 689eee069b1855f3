"""The state of the simulated GPUs: memory, streams, who waits for whom, what was found wrong."""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from simcuda.allocator import MIB, Allocator, Block
from simcuda.clocks import Accesses, Actor
from simcuda.private import storage_key

SMALL_WORKSPACE = 2 * (4 << 20) + 16 * (8 << 10)  # of cuBLAS, per handle and stream
HOPPER_WORKSPACE = 32 * MIB


class Race(AssertionError):
    """Nothing orders two accesses of the same bytes."""


class HostAccess(RuntimeError):
    """The host reads or writes the memory of a GPU."""


class MixedDevices(RuntimeError):
    """An operation on tensors of several devices."""


class CaptureError(RuntimeError):
    """What a stream that is captured may not do."""


class Unpinned(AssertionError):
    """An asynchronous copy of memory that is not pinned: it would be a synchronous one."""


def where() -> str:
    """The project's line that is running, known by its module: a checkout may be imported through
    another path than this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("subspec."):
            file = Path(frame.f_code.co_filename).name
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@dataclass(eq=False)
class Memory:
    """A storage of a GPU."""

    index: int  # of the GPU
    stream: Any  # whose it is: memory that is free again may be reused there without waiting
    accesses: Accesses
    block: Block | None  # of the allocator; None: empty, or the host's


class CurrentOfThread(threading.local):
    def __init__(self) -> None:
        self.device = 0
        self.streams = dict[int, Any]()
        self.host = Actor(f"host {threading.current_thread().name}")


@dataclass(eq=False)
class Simulation:
    num_devices: int = 2
    total_bytes: int = 24 << 30
    capability: tuple[int, int] = (8, 9)
    gpu_name: str = "Simulated GPU"
    context_bytes: int = 300 << 20
    strict: bool = True  # a race raises where it is found, besides being listed
    # "meta": shapes alone, for models that fit no memory.
    back: torch.device = torch.device("cpu")
    keeps: bool = True  # graphs keep what they recorded, to replay it
    lock: threading.RLock = field(default_factory=threading.RLock)
    races: list[str] = field(default_factory=list)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # of the host: what, where
    operations: Counter[str] = field(default_factory=Counter)
    num_launches: int = 0
    registered: dict[int, int] = field(default_factory=dict)  # host address -> bytes
    mapped: dict[int, Memory] = field(default_factory=dict)  # by the same address
    register_status: list[int] = field(default_factory=list)  # of the next cudaHostRegister calls
    storages: dict[int, Memory] = field(default_factory=dict)
    streams: list[Any] = field(default_factory=list)
    num_pools: int = 0
    graphs: Any = field(default_factory=weakref.WeakSet)
    capturing: Any = None  # the graph
    workspaces: dict[tuple[int, int], Block] = field(default_factory=dict)
    dequantized: dict[Any, torch.Tensor] = field(default_factory=dict)
    dispatch: Callable[..., Any] = lambda *_: None

    def __post_init__(self) -> None:
        self.thread = CurrentOfThread()
        self.allocators = [
            Allocator(self.total_bytes, self._live_pools) for _ in range(self.num_devices)
        ]
        self.defaults: list[Any] = []  # streams, one for each GPU

    def _live_pools(self) -> set[object]:
        return {graph.pool for graph in list(self.graphs) if graph.pool is not None}

    # Who runs where

    def current(self, index: int) -> Any:
        """The current stream of this thread on a GPU."""
        return self.thread.streams.get(index, self.defaults[index])

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        index, device = stream.device.index, self.thread.device
        before = self.current(index)
        self.thread.device, self.thread.streams[index] = index, stream
        try:
            yield
        finally:
            self.thread.device, self.thread.streams[index] = device, before

    def device_of(self, device: Any) -> torch.device:
        """torch's many ways to name a GPU."""
        if isinstance(device, int):
            return torch.device("cuda", device)
        index = None if device is None else torch.device(device).index
        return torch.device("cuda", self.thread.device if index is None else index)

    # What runs

    def launch(self, stream: Any) -> None:
        """After what the host has seen, and all before it on the stream."""
        self.num_launches += 1
        stream.actor.join(self.thread.host.clock)
        stream.actor.tick()

    def wait(self, what: str, stream: Any = None) -> None:
        """The host waits for a stream, or for all."""
        self.check_not_capturing(what)
        self.waits[what, where()] += 1
        for one in self.streams if stream is None else [stream]:
            self.thread.host.join(one.actor.clock)

    def check_not_capturing(self, what: str) -> None:
        if self.capturing is not None:
            raise CaptureError(f"not permitted while a stream is captured: {what} at {where()}")

    def check_triton(self, device: torch.device) -> None:
        """Triton launches on the thread's current GPU, whatever it is given."""
        if device.index != self.thread.device:
            raise MixedDevices(
                f"Triton launches on cuda:{self.thread.device}, with tensors of {device}, "
                f"at {where()}"
            )

    def step(self, stream: Any, what: str, reads: Sequence[Any], writes: Sequence[Any]) -> None:
        """An operation that reads and writes simulated tensors."""
        self.launch(stream)
        self.touch(stream, what, *accesses(reads, writes))

    def touch(self, stream: Any, what: str, reads: Sequence[Any], writes: Sequence[Any]) -> None:
        """reads, writes: (storage, first byte, end)"""
        said = f"{what} at {where()}" if len(self.streams) > self.num_devices else what
        for ranges, is_write in ((reads, False), (writes, True)):
            for key, first, end in ranges:
                memory = self.storages.get(key)
                if memory is not None and end > first:
                    memory.accesses.add(stream.actor, (first, end), is_write, said)

    def report(self, text: str) -> None:
        self.races.append(text)
        if self.strict:
            raise Race(text)

    # Memory

    def add_storage(self, inner: torch.Tensor, device: torch.device, stream: Any) -> None:
        """Takes memory for the storage of `inner`, unless it has some."""
        key = storage_key(inner)
        if key in self.storages:
            return
        storage = inner.untyped_storage()
        pool = None if self.capturing is None else self.capturing.pool
        allocator, block = self.allocators[device.index], None
        if storage.nbytes():
            try:
                block = allocator.allocate(storage.nbytes(), stream.actor.number, pool)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(f"{error} at {where()}") from None
        self._know(key, storage, Memory(device.index, stream, Accesses(self.report), block))

    def add_mapped(self, inner: torch.Tensor, device: torch.device) -> None:
        """The storage is registered host memory."""
        memory = Memory(device.index, self.current(device.index), Accesses(self.report), None)
        self.mapped[inner.data_ptr()] = memory
        self._know(storage_key(inner), inner.untyped_storage(), memory)

    def end_mapping(self, address: int) -> None:
        """What a GPU reads there from now on is a fault."""
        memory = self.mapped.pop(address, None)
        if memory is not None:
            self._end(memory)

    def _know(self, key: int, storage: Any, memory: Memory) -> None:
        self.storages[key] = memory
        weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        """The storage is free: its next owner on the same stream begins without waiting."""
        memory = self.storages.pop(key, None)
        if memory is None:
            return
        self._end(memory)
        if memory.block is not None:
            self.allocators[memory.index].give_back(memory.block)

    def _end(self, memory: Memory) -> None:
        memory.accesses.freed = True
        left = memory.accesses.unordered_with(memory.stream.actor, self.thread.host)
        self.races += [f"freed while {one} may still run" for one in left]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        return any(a <= first and first + size <= a + n for a, n in self.registered.items())

    def take_workspace(self, index: int, stream: Any) -> None:
        """cuBLAS' own, through torch's allocator, one per handle and stream, never given back."""
        key = index, stream.actor.number
        if key not in self.workspaces:
            size = HOPPER_WORKSPACE if self.capability[0] == 9 else SMALL_WORKSPACE
            self.workspaces[key] = self.allocators[index].allocate(size, stream.actor.number, None)


def accesses(reads: Sequence[Any], writes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [extent(one.inner) for one in reads], [extent(one.inner) for one in writes]


def extent(inner: torch.Tensor) -> tuple[int, int, int]:
    """(storage, first byte, end) of what a tensor spans."""
    if inner.numel() == 0:
        return storage_key(inner), 0, 0
    span = sum((n - 1) * s for n, s in zip(inner.shape, inner.stride(), strict=True)) + 1
    first = inner.storage_offset() * inner.element_size()
    return storage_key(inner), first, first + span * inner.element_size()


_active: list[Simulation] = []  # the last one is


def active() -> Simulation:
    return _active[-1]


def is_active() -> bool:
    return bool(_active)


@contextmanager
def made_active(simulation: Simulation) -> Iterator[None]:
    _active.append(simulation)
    try:
        yield
    finally:
        _active.remove(simulation)
