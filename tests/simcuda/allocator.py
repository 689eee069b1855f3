"""torch's caching allocator of a GPU as CUDACachingAllocator.cpp has it with its default settings:
segments, splits, a pool for each capture, the process's fraction. Sizes alone, no bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

MIB = 1 << 20
Pool = tuple[object, bool]  # of which capture (None: of none), and whether for small blocks


@dataclass(eq=False)
class Block:
    segment: int
    offset: int
    size: int
    pool: Pool
    stream: int
    free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


class Allocator:
    def __init__(self, total_bytes: int, live_pools: Callable[[], set[object]]) -> None:
        """live_pools: of captures that may still be replayed: their memory is kept."""
        self.total_bytes = total_bytes
        self.other_bytes = 0  # of the driver: context, libraries
        self.fraction: float | None = None
        self.reserved = self.allocated = self.most_reserved = self.most_allocated = 0
        self._live_pools = live_pools
        self._free = list[Block]()
        self._segments = dict[int, int]()  # number -> bytes
        self._num_segments = 0

    @property
    def allowed_bytes(self) -> int:
        share = 1.0 if self.fraction is None else self.fraction
        return int(share * self.total_bytes)

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.reserved - self.other_bytes

    def allocate(self, num_bytes: int, stream: int, pool: object) -> Block:
        size = max(512, -(-num_bytes // 512) * 512)
        small = size <= MIB
        fitting = [
            one for one in self._free
            if one.pool == (pool, small) and one.stream == stream and one.size >= size
        ]  # fmt: skip
        block = min(fitting, key=lambda b: (b.size, b.segment, b.offset), default=None)
        if block is None:
            block = self._new_segment(size, (pool, small), stream)
        else:
            self._free.remove(block)
        left = block.size - size
        if left >= 512 if small else left > MIB:
            rest = Block(block.segment, block.offset + size, left, block.pool, stream)
            rest.before, rest.after = block, block.after
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._free.append(rest)
        block.free = False
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def give_back(self, block: Block) -> None:
        """Merged with free neighbours; the segment stays reserved."""
        self.allocated -= block.size
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free:
            self._free.remove(before)
            block.offset, block.size = before.offset, block.size + before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._free.remove(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        self._free.append(block)

    def empty(self) -> None:
        """Segments without a used block go back to the driver, but those of live captures."""
        live = self._live_pools()
        for block in list(self._free):
            whole = block.before is None and block.after is None
            if whole and (block.pool[0] is None or block.pool[0] not in live):
                self._free.remove(block)
                self.reserved -= self._segments.pop(block.segment)

    def _new_segment(self, size: int, pool: Pool, stream: int) -> Block:
        _, small = pool
        whole = 2 * MIB if small else 20 * MIB
        if size >= 10 * MIB:
            whole = -(-size // (2 * MIB)) * 2 * MIB
        if not self._has_room(whole):
            self.empty()
            if not self._has_room(whole):
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {whole} bytes: {self.reserved} are "
                    f"reserved, {self.allocated} allocated, {self.allowed_bytes} allowed"
                )
        self._num_segments += 1
        self._segments[self._num_segments] = whole
        self.reserved += whole
        self.most_reserved = max(self.most_reserved, self.reserved)
        return Block(self._num_segments, 0, whole, pool, stream)

    def _has_room(self, num_bytes: int) -> bool:
        return self.reserved + num_bytes <= self.allowed_bytes and num_bytes <= self.free_bytes
