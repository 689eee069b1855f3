"""Fast memory: allocation by the plan's ledger, and measurement of its peak."""

import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.gpu_memory import held_bytes
from subspec.artifacts.common.host_memory import free_host_bytes
from subspec.artifacts.common.sizes import format_size
from subspec.artifacts.footprint import aligned
from subspec.artifacts.model import PAGE_BYTES
from subspec.artifacts.plan import Ledger

HUGE_PAGE_BYTES = 2 << 20
HOST_FLAGS = 1 | 2  # of cudaHostRegister: portable, mapped


@dataclass(frozen=True)
class Arena:
    bytes: Tensor  # uint8
    release: Callable[[], object]


class FastMemory:
    """One arena per purpose of the ledger; tensors are taken from it in order and not freed singly.

    Arenas never grow: taking more than the ledger has is a bug in subspec.
    Raises SubspecError(RESOURCES) if there is not enough memory.
    """

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        self.device = device
        self._arenas: list[Arena] = []
        self._free: dict[str, Tensor] = {}
        needed = ledger.total_bytes
        if device.type == "cpu" and needed > free_host_bytes():
            raise SubspecError(
                Exit.RESOURCES,
                f"the plan needs {format_size(needed)} of memory, but only "
                f"{format_size(free_host_bytes())} are free",
                f"close other programs, or re-plan with --vram {free_host_bytes() * 9 // 10}B",
            )
        try:
            for purpose, num_bytes in ledger.arenas.items():
                if num_bytes > 0:
                    self._arenas.append(self._allocate(num_bytes))
                    self._free[purpose] = self._arenas[-1].bytes
        except BaseException:
            self.release()
            raise
        self.arena_bytes = sum(arena.numel() for arena in self._free.values())

    def release(self) -> None:
        """Free the memory, even if tensors still refer to it: their contents are undefined
        afterwards."""
        for arena in self._arenas:
            arena.release()

    def take(self, purpose: str, num_bytes: int, alignment: int = 1) -> Tensor:
        """uint8 [num_bytes] from the arena of `purpose`, which continues at an aligned address."""
        size = max(aligned(num_bytes), -(-num_bytes // alignment) * alignment)
        arena = self._free.get(purpose)
        left = 0 if arena is None else arena.numel()
        assert arena is not None and size <= left, (
            f"{purpose}: {size} bytes requested, ledger has {left}"
        )
        self._free[purpose] = arena[size:]
        return arena[:num_bytes]

    def take_tensor(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Tensor of the given shape and dtype from the arena of `purpose`."""
        count = torch.Size(shape).numel()
        return self.take(purpose, count * dtype.itemsize).view(dtype).view(shape)

    def _allocate(self, num_bytes: int) -> "Arena":
        """Allocate zeros, because unwritten cache slots are read and multiplied by 0, and 0 * NaN
        is NaN."""
        if self.device.type == "cpu":
            pages, memory = host_pages(num_bytes)
            return Arena(memory, lambda: pages.madvise(mmap.MADV_DONTNEED))
        try:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
            return Arena(memory, lambda: memory.untyped_storage().resize_(0))
        except torch.OutOfMemoryError:
            free, _ = torch.cuda.mem_get_info(self.device)
            raise SubspecError(
                Exit.RESOURCES,
                f"the plan needs another {format_size(num_bytes)} of GPU memory, "
                f"but only {format_size(free)} are free",
                "close other programs that use the GPU, or re-plan with a smaller --vram",
            ) from None


def check_host_memory(num_bytes: int, parts: str = "", less: str = "a larger --vram") -> None:
    """Raise SubspecError(RESOURCES) if so much host memory is not free: touching it would get this
    process or another one killed. parts: what it is for; less: options of a plan that needs
    less."""
    if num_bytes > (free := free_host_bytes()):
        raise SubspecError(
            Exit.RESOURCES,
            f"the plan needs {format_size(num_bytes)} of host memory, but only "
            f"{format_size(free)} are free" + (f": {parts}" if parts else ""),
            f"close other programs, or plan with {less}",
        )


def host_buffer(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] from `host_pages`, freed with the last tensor that refers to it."""
    return host_pages(num_bytes)[1]


def host_pages(num_bytes: int) -> tuple[mmap.mmap, Tensor]:
    """A mapping, and uint8 [num_bytes] of zeros in it at a page boundary, as direct reads need; in
    huge pages if large. Raises SubspecError(RESOURCES).

    The pages are touched here: the first touch of a huge page is slow, later reads are 1.5x faster.
    """
    huge = num_bytes >= 4 * HUGE_PAGE_BYTES
    alignment = HUGE_PAGE_BYTES if huge else PAGE_BYTES
    size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    try:
        memory = mmap.mmap(-1, size + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise SubspecError(
            Exit.RESOURCES,
            f"cannot reserve {format_size(num_bytes)} of memory: {error.strerror}",
            "re-plan with a smaller --vram",
        ) from None
    if huge:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % alignment
    return memory, whole[start : start + size].fill_(0)[:num_bytes]


def pinned_buffer(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of host memory that the GPU reads directly (page-locked and mapped), to be
    released by `unpin`. torch's pinned allocator would round the size up to a power of two. Raises
    SubspecError(RESOURCES)."""
    check_host_memory(num_bytes)
    buffer = host_buffer(num_bytes)
    status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), num_bytes, HOST_FLAGS))
    if status:
        raise SubspecError(
            Exit.RESOURCES,
            f"pinning {num_bytes} bytes of host memory failed (CUDA error {status})",
            "free host memory, raise `ulimit -l`, or plan with a larger --vram",
        )
    return buffer


def unpin(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def bytes_of(tensor: Tensor) -> memoryview:
    """The writable bytes of a contiguous host tensor uint8 [n]."""
    return memoryview(tensor.numpy().data)


class Temporaries(TorchDispatchMode):
    """Live and peak bytes of the tensors that operations create while the mode is active.

    Memory that an operation allocates and frees internally is not seen: the ledger's guard covers
    it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default imports torch._dynamo, 0.8 s, at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {_storage_key(t) for t in _tensors((args, kwargs or {}))}
        for tensor in _tensors(outputs):
            key = _storage_key(tensor)
            if key not in given and key not in self._known:
                self._add(tensor, key)
        return outputs

    def _add(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        num_bytes = storage.nbytes()
        self._known.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

        def freed() -> None:
            self._known.discard(key)
            self.live_bytes -= num_bytes

        weakref.finalize(storage, freed)


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class PeakMeter:
    """Peak bytes of fast memory that this process used for the model.

    cuda: everything, as the driver counts it (context, allocator, arenas). cpu: arenas and
    temporaries; the interpreter and torch themselves do not count against the budget.
    """

    def __init__(self, memory: FastMemory) -> None:
        self._memory = memory
        self._temporary_bytes = 0
        self._outside_bytes = 0
        if memory.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(memory.device)  # of an earlier engine

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure temporaries inside the block (on cuda the allocator always does)."""
        if self._memory.device.type == "cuda":
            yield
            return
        with Temporaries() as seen:
            yield
        self._temporary_bytes = max(self._temporary_bytes, seen.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        if self._memory.device.type == "cuda":
            device, held = self._memory.device, held_bytes(self._memory.device)
            if held is None:  # then other programs' memory counts too
                free, total = torch.cuda.mem_get_info(device)
                held = total - free
            # Libraries and graphs allocate outside the allocator, when they are first used.
            outside = held - torch.cuda.memory_reserved(device)
            self._outside_bytes = max(self._outside_bytes, outside)
            return self._outside_bytes + torch.cuda.max_memory_reserved(device)
        return self._memory.arena_bytes + self._temporary_bytes
