"""Streamed parts by name, from staging slots that are filled in the background.

`Ring` is for parts that every pass needs in the same order, `Requested` for parts that are only
known at run time. Both order copies and compute through a Link.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.model import StoredPart
from subspec.artifacts.plan import Block
from subspec.runtime.stream.link import Link

Check = Callable[[Block, Tensor], Callable[[], None]]  # starts a check; the result waits for it


class StreamedParts(Protocol):
    """Parts that are not resident, by name."""

    @property
    def streamed_bytes(self) -> int: ...

    @property
    def wait_seconds(self) -> float: ...

    def take(self, name: str) -> Tensor:
        """Return the part as stored, by `view_of`, valid until the next call. Raises SubspecError
        if it could not be read."""

    def settle(self) -> None:
        """Wait for the digest check of the last part. Raises SubspecError(CORRUPT)."""

    def begin_pass(self) -> None:
        """Begin a pass, also after one that was cut short. Raises SubspecError if reading has
        failed."""

    def end_pass(self) -> None:
        """End a pass, once all of its compute is issued."""

    def close(self) -> None: ...


def unchecked(block: Block, memory: Tensor) -> Callable[[], None]:
    return lambda: None


class Ring:
    """Blocks in cyclic order in a few slots; parts must be taken in this order.

    At the end of a pass the first blocks of the next one are already being copied, so they arrive
    while the draft runs.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        offsets: Sequence[int],
        link: Link,
        num_slots: int,
        dtype: torch.dtype,
        check: Check = unchecked,
    ) -> None:
        """`check` compares a block with its digests when it is streamed for the first time. It runs
        in parallel with the compute that reads the block, and ends before the next block is
        taken."""
        self.streamed_bytes = 0
        self._check = check
        self._checked: Callable[[], None] = lambda: None
        self._blocks = blocks
        self._offsets = offsets
        self._link = link
        self._num_slots = num_slots
        self._dtype = dtype
        self._num_begun = 0
        self._num_taken = 0
        self._arrived: dict[str, Tensor] = {}
        self._in_pass = False
        self._unchecked = {*range(len(blocks))}
        self._failure: SubspecError | None = None  # raised again by every later call
        self._fill()

    @property
    def wait_seconds(self) -> float:
        return self._link.wait_seconds

    def take(self, name: str) -> Tensor:
        if self._failure is not None:
            raise self._failure
        if name not in self._arrived:
            self._release()
            self._take_block()
            assert name in self._arrived, f"{name} was taken out of order"
        return self._arrived[name]

    def settle(self) -> None:
        with self._failures_kept():
            self._checked()
        self._checked = lambda: None

    def begin_pass(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._in_pass:  # the last one was cut short
            self.settle()
            self._link.forget()
            self._arrived, self._num_begun, self._num_taken = {}, 0, 0
        self._in_pass = True
        self._fill()

    def end_pass(self) -> None:
        self._release()
        self._in_pass = False

    def close(self) -> None:
        self._link.close()

    def _take_block(self) -> None:
        index, offset = self._num_taken % len(self._blocks), 0
        block = self._blocks[index]
        with self._failures_kept():
            memory = self._link.wait(self._num_taken % self._num_slots)
        self._num_taken += 1
        self.streamed_bytes += block.num_bytes
        for part in block.parts:
            self._arrived[part.name] = view_of(part, memory[offset:], self._dtype)
            offset += part.padded_bytes
        if index in self._unchecked:
            with self._failures_kept():  # an earlier part's, if the queue is full
                self._checked = self._check(block, memory)
            self._unchecked.remove(index)

    def _release(self) -> None:
        """Allow the last block's slot to be filled again, as its compute is issued. Raises the
        error of the block's check."""
        if self._arrived:
            self.settle()
            self._link.release((self._num_taken - 1) % self._num_slots)
            self._arrived = {}
        self._fill()

    @contextmanager
    def _failures_kept(self) -> Iterator[None]:
        try:
            yield
        except SubspecError as error:
            self._failure = error
            raise

    def _fill(self) -> None:
        """Start copies into all free slots."""
        while self._num_begun < self._num_taken + self._num_slots:
            index = self._num_begun % len(self._blocks)
            slot = self._num_begun % self._num_slots
            self._link.begin(slot, self._offsets[index], self._blocks[index].num_bytes)
            self._num_begun += 1


class Requested:
    """Parts in any order, one per slot, with the least recently used ones evicted. A part that was
    not requested ahead is waited for: a wrong guess costs time, but does not change tokens."""

    def __init__(
        self,
        parts: Sequence[StoredPart],
        offsets: Mapping[str, int],
        link: Link,
        num_slots: int,
        dtype: torch.dtype,
    ) -> None:
        """offsets: of each part in the link's file; num_slots: at least 2."""
        assert num_slots >= 2, "one is read while another is filled"
        self.streamed_bytes = 0
        self._parts = {part.name: part for part in parts}
        self._offsets = offsets
        self._link = link
        self._dtype = dtype
        self._free = list(range(num_slots))
        self._slots: dict[str, int] = {}  # least recently used first
        self._views: dict[str, Tensor] = {}  # of those that have arrived
        self._in_use: str | None = None
        self._failure: SubspecError | None = None  # raised again by every later call

    @property
    def wait_seconds(self) -> float:
        return self._link.wait_seconds

    def request(self, names: Sequence[str]) -> None:
        """Start copying the parts that are not in a slot, in this order, as far as slots allow."""
        for name in names:
            if name in self._slots:
                continue
            if not self._free and not self._make_room(names):
                return
            self._begin(name)

    def take(self, name: str) -> Tensor:
        self._release()
        if name not in self._slots:
            if not self._free and not self._make_room():  # all are being copied
                guess = next(iter(self._slots))
                self._arrive(guess)
                self._link.release(self._slots[guess])
                self._make_room()
            self._begin(name)
        found = self._arrive(name)
        self._slots[name] = self._slots.pop(name)  # used last
        self._in_use = name
        return found

    def settle(self) -> None:
        """Nothing to do: there are no background checks."""

    def begin_pass(self) -> None:
        self._release()

    def end_pass(self) -> None:
        self._release()

    def close(self) -> None:
        self._link.close()

    def _arrive(self, name: str) -> Tensor:
        """Wait for the part's copy, once per copy: a failed copy is not repeated."""
        if self._failure is not None:
            raise self._failure
        if name not in self._views:
            try:
                memory = self._link.wait(self._slots[name])
            except SubspecError as error:
                self._failure = error
                raise
            self._views[name] = view_of(self._parts[name], memory, self._dtype)
        return self._views[name]

    def _make_room(self, wanted: Sequence[str] = ()) -> bool:
        """Free a slot. Return False if every slot is being filled, in use or `wanted`."""
        kept = {self._in_use, *wanted}
        idle = (one for one in self._slots if one in self._views and one not in kept)
        oldest = next(idle, None)
        if oldest is None:
            return False
        del self._views[oldest]
        self._free.append(self._slots.pop(oldest))
        return True

    def _begin(self, name: str) -> None:
        part = self._parts[name]
        self._slots[name] = self._free.pop()
        self._link.begin(self._slots[name], self._offsets[name], part.padded_bytes)
        self.streamed_bytes += part.padded_bytes

    def _release(self) -> None:
        if self._in_use is not None:
            self._link.release(self._slots[self._in_use])
            self._in_use = None


def view_of(part: StoredPart, memory: Tensor, dtype: torch.dtype) -> Tensor:
    """View of a part in memory, uint8, that begins with its bytes: [rows, K] of `dtype` or of FP8
    codes, or uint8 [bytes] of a residual."""
    found = memory[: part.num_bytes]
    if part.is_residual:
        return found
    stored = torch.float8_e4m3fn if part.encoding == "fp8" else dtype
    return found.view(stored).view(part.part.num_rows, -1)
